// WKV-7 on the GPU: the recurrence at the heart of RWKV-7, forward and backward, in a file without includes.
// Reference: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025); RWKV-LM, RWKV-v7.
// Letters:  B batch   T tokens   H heads   N head size   L = 16 tokens a chunk   C = ceil(T / L) chunks
//
// A head keeps a state S, N x N [value, key]; token t brings r, w, k, v, a, b, of N numbers each:
//
//     u_t = S_{t-1} a_t                                 what the state holds under a
//     S_t = S_{t-1} diag(w_t) + u_t b_t' + v_t k_t'     decay, move that to b, add the pair (k, v)
//     y_t = S_t r_t                                     read with r
//
// The decay comes as log_w = log w, in [-4, 0]: products of 16 decays, and their inverses, stay inside fp32
// (RWKV-7 never goes below -0.6066). A token of zeros, log_w = 0 too, leaves the state as it is: so a T that
// is no multiple of 16 is filled up here, and so a model pads.
//
// Part 1 is the hardware: a few instructions, and 16 x 16 tiles made of them. Part 2 is the operator token by
// token in fp32, as the equations stand: read it first. Parts 3 to 5 take 16 tokens at a time, with matrix
// products on the tensor cores (bf16 operands, fp32 sums and states): what one trains with.
//
// Compiled at run time for sm_80 or newer, once for a head size and an input type, bf16 or fp32, by NVRTC or
// nvcc -cubin: -DHEAD_SIZE=64 -DINPUT_BF16=1 --std=c++17. Entry points, with 32-bit ints:
//
//     wkv_token_forward <<<(H, B), N>>>(T, H, r, log_w, k, v, a, b, s0, y, sT)
//     wkv_forward       <<<(H, B, Z), 32 (5 + N / 16 / Z), wkv_shared_bytes[0]>>>
//                                      (T, H, r, log_w, k, v, a, b, s0, y, sT, checkpoints)
//     wkv_backward_chain<<<(H, B, Z), 32 (5 + N / 16 / Z), wkv_shared_bytes[0]>>>
//                                      (T, H, segment, r, log_w, a, b, dy, dsT, carry)
//     wkv_backward      <<<(H, B, segments), 2 N, wkv_shared_bytes[1]>>>
//                                      (T, H, segment, r, log_w, k, v, a, b, checkpoints, dy, dsT, carry,
//                                       dr, dlog_w, dk, dv, da, db, ds0)
//
// r, k, v, a, b, y and their gradients are (B, T, H, N) in the input type, log_w and dlog_w the same in fp32;
// s0, sT, dsT, ds0 are (B, H, N, N) fp32, and s0 and dsT may be null (zero). All are contiguous and 16-byte
// aligned; outputs are written in full. checkpoints: B*H*C*N*N bf16 in an order of their own, null if no
// backward follows. Z divides N / 16 and spreads a state's rows over Z blocks. A segment is `segment` chunks;
// segments = ceil(C / segment). With one, wkv_backward is all, and carry null. With several, the chain goes
// first and fills carry, (B, H, segments, N, N) fp32. No atomics: sums have one order, runs agree bit by bit.

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

constexpr int N = HEAD_SIZE;
constexpr int L = 16;
constexpr int TILES = N / 16;           // 16 x 16 tiles along a row of N
constexpr int ROW = N + 8;              // a row of N in shared memory, longer: 8 rows lie in different banks
constexpr int SMALL = L + 8;            // the same for a row of an L x L matrix
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr bool SHARING = N <= 64;       // an SM has 228 KB of shared memory: several blocks share it
#else
constexpr bool SHARING = false;         // it has 100 or 164 KB: a block may take the registers of two
#endif
static_assert(N == 16 || N == 32 || N == 64 || N == 128, "HEAD_SIZE must be 16, 32, 64 or 128");

typedef unsigned short bf16;            // the upper half of an fp32
#if INPUT_BF16
typedef bf16 input;
#else
typedef float input;
#endif

// ---- Part 1. The hardware --------------------------------------------------------------------------------
#ifndef CUDA_ON_CPU                     // tests/cuda_on_cpu.h brings its own, to run this file without a GPU
// two fp32 to two bf16 in a word, to nearest even; `low` is the one at the lower address
DEVICE unsigned pack(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// 2^x and 1 / x, good to a bit or two
DEVICE float exp2_fast(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

// d (16 x 8, fp32) += a (16 x 16, bf16) b (16 x 8, bf16), by the 32 lanes of a warp together
DEVICE void mma(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// four 8 x 8 blocks of shared memory; lane i names row i % 8 of block i / 8, and gets a pair of each block
template <typename Factor, bool TRANSPOSED> DEVICE Factor load_blocks(const bf16* row) {
    Factor t;
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(t.x[0]),
                     "=r"(t.x[1]), "=r"(t.x[2]), "=r"(t.x[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(t.x[0]),
                     "=r"(t.x[1]), "=r"(t.x[2]), "=r"(t.x[3]) : "r"(shared_address(row)) : "memory");
    return t;
}

// an 8 x 8 block held by a warp, a pair in each lane, to its transpose
DEVICE unsigned transpose_block(unsigned x) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// 16 bytes from global to shared memory in the background, or 16 zero bytes
DEVICE void copy_async(void* to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}

// closes a group of copies; the wait ends when all this thread's groups but the newest `PENDING` have landed
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING)); }
#endif

DEVICE float low_half(unsigned word) { return __uint_as_float(word << 16); }
DEVICE float high_half(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
DEVICE float load_one(const float* from) { return *from; }
DEVICE float load_one(const bf16* from) { return low_half(*from); }
DEVICE float2 load_two(const float* from) { return *(const float2*)from; }
DEVICE float2 halves(unsigned word) { return make_float2(low_half(word), high_half(word)); }
DEVICE float2 load_two(const bf16* from) { return halves(*(const unsigned*)from); }
DEVICE void store_one(float* to, float x) { *to = x; }
DEVICE void store_one(bf16* to, float x) { *to = (bf16)pack(x, 0.f); }
DEVICE void store_two(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }
DEVICE void store_two(bf16* to, float x, float y) { *(unsigned*)to = pack(x, y); }

// A warp holds a 16 x 16 tile in registers, 8 numbers a lane: number i in row row_of(i), column column_of(i).
// A Sum is fp32, where products add up. A Left is bf16, numbers 2i and 2i + 1 in word i: the left factor of
// a product. Rounding a Sum gives a Left with nothing moved between lanes. A Right is the right factor: the
// same four 8 x 8 blocks, each transposed, so that a result becomes one in registers too. Where the 8 bits of
// a bf16 are too few, a factor comes in two: rounded, and the rest that rounding took, rounded as well.
struct Sum { float x[8]; };
struct __align__(16) Left { unsigned x[4]; };
struct Right { unsigned x[4]; };
struct Halves { Right high, rest; };

DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int row_of(int i) { return lane() / 4 + i / 2 % 2 * 8; }
DEVICE int column_of(int i) { return lane() % 4 * 2 + i / 4 * 8 + i % 2; }
DEVICE float number(const Left& t, int i) { return i % 2 ? high_half(t.x[i / 2]) : low_half(t.x[i / 2]); }

// The tile at m in shared memory, rows `row` apart, as it lies, and transposed. Blocks are named in the order
// in which mma wants them: moving words between registers afterwards would cost more.
DEVICE Left left(const bf16* m, int row) {
    return load_blocks<Left, false>(m + lane() % 16 * row + lane() / 16 * 8);
}
DEVICE Left left_transposed(const bf16* m, int row) {
    return load_blocks<Left, true>(m + (lane() % 8 + lane() / 16 * 8) * row + lane() / 8 % 2 * 8);
}
DEVICE Right right(const bf16* m, int row) {
    return load_blocks<Right, true>(m + lane() % 16 * row + lane() / 16 * 8);
}
DEVICE Right right_transposed(const bf16* m, int row) {
    return load_blocks<Right, false>(m + (lane() % 8 + lane() / 16 * 8) * row + lane() / 8 % 2 * 8);
}

DEVICE Left transposed(const Left& t) {
    return {transpose_block(t.x[0]), transpose_block(t.x[2]),
            transpose_block(t.x[1]), transpose_block(t.x[3])};
}
DEVICE Right as_right(const Left& t) {
    return {transpose_block(t.x[0]), transpose_block(t.x[1]),
            transpose_block(t.x[2]), transpose_block(t.x[3])};
}

DEVICE Left rounded(const Sum& s) {
    return {pack(s.x[0], s.x[1]), pack(s.x[2], s.x[3]), pack(s.x[4], s.x[5]), pack(s.x[6], s.x[7])};
}
DEVICE Left rest(const Sum& s, const Left& high) {
    Sum difference;
    UNROLL for (int i = 0; i < 8; i++)
        difference.x[i] = s.x[i] - number(high, i);
    return rounded(difference);
}
DEVICE Halves in_halves(const Sum& s) {
    const Left high = rounded(s);
    return {as_right(high), as_right(rest(s, high))};
}

// sum += l r; of the four products of halves, the smallest is left out
DEVICE void add_product(Sum& sum, const Left& l, const Right& r) {
    mma(sum.x, l.x, r.x[0], r.x[1]);
    mma(sum.x + 4, l.x, r.x[2], r.x[3]);
}
DEVICE void add_product(Sum& sum, const Left& l, const Halves& r) {
    add_product(sum, l, r.high);
    add_product(sum, l, r.rest);
}
DEVICE void add_product(Sum& sum, const Sum& l, const Halves& r) {
    const Left high = rounded(l);
    add_product(sum, high, r);
    add_product(sum, rest(l, high), r.high);
}

// a tile to memory, rows `row` apart
DEVICE void store(float* to, int row, const Sum& s) {
    UNROLL for (int i = 0; i < 8; i += 2)
        store_two(to + row_of(i) * row + column_of(i), s.x[i], s.x[i + 1]);
}
DEVICE void store(bf16* to, int row, const Left& t, int rows = L) {
    UNROLL for (int i = 0; i < 8; i += 2)
        if (row_of(i) < rows)
            *(unsigned*)(to + row_of(i) * row + column_of(i)) = t.x[i / 2];
}

// its transpose, of which the first `rows` rows
DEVICE void store_transposed(bf16* to, int row, const Sum& s, int rows) {
    store(to, row, transposed(rounded(s)), rows);
}
DEVICE void store_transposed(float* to, int row, const Sum& s, int rows) {
    UNROLL for (int i = 0; i < 8; i++)
        if (column_of(i) < rows)
            to[column_of(i) * row + row_of(i)] = s.x[i];
}

struct Place {
    long long head, origin;             // b H + h; element (b, 0, h, 0) of x
    int stride, chunks;                 // elements from token to token; C
};

DEVICE Place this_place(int T, int H) {
    const long long b = blockIdx.y;
    return {b * H + blockIdx.x, (b * T * H + blockIdx.x) * N, H * N, (T + L - 1) / L};
}

// ---- Part 2. Token by token in fp32 ----------------------------------------------------------------------
// Rows of S do not touch each other: thread i keeps row i in registers, with r, w, k, a, b in shared memory.
extern "C" __global__ void __launch_bounds__(N) wkv_token_forward(
        int T, int H, const input* r_, const float* log_w_, const input* k_, const input* v_, const input* a_,
        const input* b_, const float* s0, input* y_, float* sT) {
    static __shared__ float r[N], w[N], k[N], a[N], b[N];
    const Place place = this_place(T, H);
    const int i = threadIdx.x;
    float S[N];
    for (int j = 0; j < N; j++)
        S[j] = s0 ? s0[(place.head * N + i) * N + j] : 0.f;
    for (int t = 0; t < T; t++) {
        const long long at = place.origin + (long long)t * place.stride + i;
        __syncthreads();                // the last token's vectors have been read
        r[i] = load_one(r_ + at);
        w[i] = expf(log_w_[at]);
        k[i] = load_one(k_ + at);
        a[i] = load_one(a_ + at);
        b[i] = load_one(b_ + at);
        __syncthreads();                // this token's are there
        const float v = load_one(v_ + at);
        float u = 0.f, y = 0.f;
        UNROLL for (int j = 0; j < N; j++)
            u += S[j] * a[j];
        UNROLL for (int j = 0; j < N; j++) {
            S[j] = S[j] * w[j] + u * b[j] + v * k[j];
            y += S[j] * r[j];
        }
        store_one(y_ + at, y);
    }
    for (int j = 0; j < N; j++)
        sT[(place.head * N + i) * N + j] = S[j];
}

// ---- Part 3. Sixteen tokens at a time --------------------------------------------------------------------
// Let P_t be the product of the chunk's decays up to and with token t, P_0 = 1. Measure every token against
// the start of the chunk (all L x N, a row a token):
//
//     R_t = r_t * P_t        A_t = a_t * P_{t-1}        Bi_s = b_s / P_s        Ki_s = k_s / P_s
//
// Then the decays are gone, and what token s does to token t is a product. With S0 the state at the start,
//
//     RB = R Bi', RK = R Ki'  for s <= t      AB = A Bi', AK = A Ki'  for s < t      (L x L, zero elsewhere)
//     Z = AK V + A S0'          what A reads of the state and of the pairs added before
//     U = Z + AB U = M Z        and of what earlier tokens moved; M = (I - AB)^-1
//     Y = RK V + RB U + R S0'
//     S_L = (S0 + U' Bi + V' Ki) diag(P_L)
//
// This is the WY form of a product of rank-one updates. RWKV-7's decays, at least 0.545 a token, make the
// plain quotient safe: 1 / P is at most 1.6e4 after 16 tokens, harmless to bf16, which has the range of fp32.
// Where keys come again, large terms cancel in what the L x L matrices add up, above all in M Z and M' dU:
// these matrices keep 16 bits, and Z and dU too. The rest keeps 8.
enum { R, A, B, K, V, DY };                         // the tensors of a chunk; B and K become Bi and Ki
enum { RB, RK, INVERSE, AK, REST };                 // its L x L matrices, M for AB; their rests from REST on

typedef bf16 Tensor[L * ROW];
typedef bf16 Matrix[L * SMALL];
template <int COUNT> struct Sources { const input* x[COUNT]; const float* log_w; };
template <int COUNT> struct Raw { input x[COUNT][L * N]; float log_w[L * N]; };         // a chunk as it comes

// one of the N / 8 threads that copy a row of N together: 16 bytes of bf16, or twice as much of fp32
template <typename Type> DEVICE void copy_row(Type* to, const Type* from, int part, bool wanted) {
    constexpr int WIDTH = 16 / sizeof(Type);
    UNROLL for (int i = 0; i < 8 / WIDTH; i++) {
        const int column = (i * (N / 8) + part) * WIDTH;
        copy_async(to + column, from + column, wanted);
    }
}

// Starts to copy a chunk to shared memory, with zeros behind the last token, and k only if KEYS; of a chunk
// that does not exist, nothing. It is there after copy_wait and a barrier. One index serves all tensors.
template <bool KEYS, int COUNT>
DEVICE void fetch(Raw<COUNT>& to, const Sources<COUNT>& from, const Place& place, int T, int chunk,
                  bool exists, int threads) {
    for (unsigned i = threadIdx.x; exists && i < L * N / 8; i += threads) {
        const unsigned t = i / (N / 8), part = i % (N / 8);
        const bool wanted = chunk * L + t < T;
        const long long at = wanted ? place.origin + (long long)(chunk * L + t) * place.stride : 0;
        UNROLL for (int n = 0; n < COUNT; n++)
            if (KEYS || n != K)
                copy_row(to.x[n] + t * N, from.x[n] + at, part, wanted);
        copy_row(to.log_w + t * N, from.log_w + at, part, wanted);
    }
    copy_commit();
}

// One warp makes R, A, Bi or Ki of a tensor, two neighbouring columns a lane (v and dy are only rounded). The
// warp with r also leaves the decays: P_L alone, or P_0 .. P_L. All loads come before the first store, which
// they would have to wait for: it may be to the same address, for all the compiler knows.
template <bool ALL_DECAYS>
DEVICE void scale(int tensor, bf16* to, const input* from, const float* log_w, float* decay) {
    const float sign = tensor < B ? 1.4426950f : -1.4426950f;           // 1 / ln 2: powers of two are cheap
    const float* steps = tensor == A ? log_w - N : log_w;               // A goes by P_{t-1}
    for (int column = lane() * 2; column < N; column += 64) {
        if (ALL_DECAYS && tensor == R)
            store_two(decay + column, 1.f, 1.f);
        float2 x[L], step[L];
        float2 sum = make_float2(0.f, 0.f);
        UNROLL for (int t = 0; t < L; t++)
            x[t] = load_two(from + t * N + column);
        UNROLL for (int t = 0; t < L && tensor < V; t++)
            step[t] = t < (tensor == A) ? sum : load_two(steps + t * N + column);
        UNROLL for (int t = 0; t < L && tensor < V; t++) {
            sum = make_float2(sum.x + step[t].x, sum.y + step[t].y);
            const float2 p = make_float2(exp2_fast(sign * sum.x), exp2_fast(sign * sum.y));
            x[t] = make_float2(x[t].x * p.x, x[t].y * p.y);
            if (tensor == R && (ALL_DECAYS || t == L - 1))
                store_two(decay + (ALL_DECAYS ? (t + 1) * ROW : 0) + column, p.x, p.y);
        }
        UNROLL for (int t = 0; t < L; t++)
            store_two(to + t * ROW + column, x[t].x, x[t].y);
    }
}

// X Y' of two L x N matrices, kept for s < t (strict) or s <= t, by one warp
DEVICE Sum triangle(const bf16* x, const bf16* y, bool strict) {
    Sum sum = {};
    UNROLL for (int i = 0; i < TILES; i++)
        add_product(sum, left(x + i * 16, ROW), right_transposed(y + i * 16, ROW));
    UNROLL for (int i = 0; i < 8; i++)
        if (column_of(i) + strict > row_of(i))
            sum.x[i] = 0.f;
    return sum;
}

// RB, RK, AK or M, and its rest, by one warp. M = (I - AB)^-1 is solved for in fp32, one column a lane, from
// the top down: x_t = [t = column] + sum_{s < t} AB_ts x_s
DEVICE void relate(int which, Matrix* m, const Tensor* x_, float* scratch) {
    const Sum sum = triangle(x_[R + which / 2], x_[B + which % 2], which / 2);
    if (which != INVERSE) {
        const Left high = rounded(sum);
        store(m[which], SMALL, high);
        return store(m[which + REST], SMALL, rest(sum, high));
    }
    float x[L];
    store(scratch, 20, sum);
    __syncwarp();
    UNROLL for (int t = 0; t < L; t++) {
        x[t] = t == lane() % 16 ? 1.f : 0.f;
        UNROLL for (int s = 0; s < t; s++)
            x[t] += scratch[t * 20 + s] * x[s];
    }
    UNROLL for (int t = 0; t < L; t++) {            // not above, where the next loads would wait for it
        const float high = low_half(pack(x[t], 0.f));
        bf16* to = m[INVERSE + lane() / 16 * REST] + t * SMALL + lane() % 16;
        store_one(to, lane() < 16 ? high : x[t] - high);
    }
}

// an L x L matrix as a right factor, as it lies and transposed
DEVICE Halves small(const Matrix* m) { return {right(m[0], SMALL), right(m[REST], SMALL)}; }
DEVICE Halves small_transposed(const Matrix* m) {
    return {right_transposed(m[0], SMALL), right_transposed(m[REST], SMALL)};
}

// where this lane's part of a state's tile is kept
DEVICE long long tile_at(const Place& place, int chunk, int row, int column) {
    return (((place.head * place.chunks + chunk) * TILES + row) * TILES + column) * 32 + lane();
}

// From here on a warp has 16 rows v0 .. v0 + 15 of a state, in fp32; in memory, null means zero
DEVICE void load_state(Sum* s, const float* from) {
    UNROLL for (int i = 0; i < TILES * 8; i++)
        s[i / 8].x[i % 8] = from ? from[row_of(i % 8) * N + i / 8 * 16 + column_of(i % 8)] : 0.f;
}
DEVICE void store_state(float* to, const Sum* s) {
    UNROLL for (int i = 0; i < TILES; i++)
        store(to + i * 16, N, s[i]);
}

// s diag(P), 16 columns of it
DEVICE void decay_columns(Sum& s, const float* decay) {
    UNROLL for (int i = 0; i < 8; i++)
        s.x[i] *= decay[column_of(i)];
}

// U' = Z' M' of these rows, Z' = S0' A' + V' AK'; z comes with the first part
DEVICE Sum moved(Sum& z, const Left& v, const Matrix* m) {
    Sum u = {};
    add_product(z, v, small_transposed(m + AK));
    add_product(u, z, small_transposed(m + INVERSE));
    return u;
}

// One chunk forward: S0 to S_L, and y
DEVICE void step(Sum* s, const Tensor* x, const Matrix* m, const float* decay, int v0, input* y_, int stride,
                 int tokens, Left* checkpoint) {
    const Left v = left_transposed(x[V] + v0, ROW);
    Sum z = {}, y = {};
    UNROLL for (int j = 0; j < TILES; j++) {
        const Left s0 = rounded(s[j]);
        if (checkpoint)
            checkpoint[j * 32] = s0;
        add_product(z, s0, right_transposed(x[A] + j * 16, ROW));
        add_product(y, s0, right_transposed(x[R] + j * 16, ROW));
    }
    add_product(y, v, small_transposed(m + RK));
    const Sum u = moved(z, v, m);
    UNROLL for (int j = 0; j < TILES; j++) {
        add_product(s[j], v, right(x[K] + j * 16, ROW));
        add_product(s[j], rounded(u), right(x[B] + j * 16, ROW));
        decay_columns(s[j], decay + j * 16);
    }
    add_product(y, u, small_transposed(m + RB));
    store_transposed(y_ + v0, stride, y, tokens);
}

// One chunk back, dLoss/dS_L to dLoss/dS0 (see part 5): leaves G~ rounded, gives dZ' = (dY' RB + G~ Bi') M
DEVICE Left step_back(Sum* g, Left* decayed, const Left& dy, const Tensor* x, const Matrix* m,
                      const float* decay) {
    Sum du = {}, dz = {};
    add_product(du, dy, small(m + RB));
    UNROLL for (int j = 0; j < TILES; j++) {
        decay_columns(g[j], decay + j * 16);
        decayed[j] = rounded(g[j]);
        add_product(du, decayed[j], right_transposed(x[B] + j * 16, ROW));
    }
    add_product(dz, du, small(m + INVERSE));
    UNROLL for (int j = 0; j < TILES; j++) {
        add_product(g[j], dy, right(x[R] + j * 16, ROW));
        add_product(g[j], rounded(dz), right(x[A] + j * 16, ROW));
    }
    return rounded(dz);
}

extern __shared__ __align__(16) unsigned char shared_memory[];

// ---- Part 4. The chain of states -------------------------------------------------------------------------
// Chunks depend on each other through S alone, so a block is an assembly line of two kinds of warps, which
// meet at one barrier a chunk. In step i
//
//     five preparing warps   start to copy chunk i + RAW - 1, scale chunk i, relate the tokens of chunk i - 1
//     the state warps        take chunk i - 2 through the recurrence, with 16 rows of S each in registers
//
// and the longest of these, not their sum, is what a chunk costs.
constexpr int PREPARING = 5;
constexpr int RAW = INPUT_BF16 ? 3 : 2;             // chunks in the air or being scaled

struct ChainShared {
    Raw<5> raw[RAW];
    Tensor x[3][5];                                 // of chunks i, i - 1, i - 2
    Matrix m[2][8];                                 // of chunks i - 1, i - 2
    float decay[3][N];                              // P_L of chunks i, i - 1, i - 2
    float scratch[L * 20];
};

// FORWARD: S from s0 to sT, with y, and S at the start of every chunk. If not, dLoss/dS from dsT to the first
// chunk (dy in v's place, no k), of which `carry` keeps what flows into the end of each segment but the last.
template <bool FORWARD>
DEVICE void chain(int T, int H, int segment, const Sources<5>& from, const float* start, input* y, float* end,
                  Left* checkpoints, float* carry) {
    ChainShared& sh = *(ChainShared*)shared_memory;
    const Place place = this_place(T, H);
    const int last = place.chunks - 1;
    const int warp = threadIdx.x / 32;
    if (warp < PREPARING) {
        const int which = (warp + 3) % 5;           // the warp that has only v to round takes the inverse
        for (int i = 0; i < RAW - 1; i++)
            fetch<FORWARD>(sh.raw[i], from, place, T, FORWARD ? i : last - i, i <= last, PREPARING * 32);
        for (int i = 0; i <= last + 2; i++) {
            copy_wait<RAW - 2>();
            __syncthreads();                        // everything moves on by one chunk
            const Raw<5>& raw = sh.raw[i % RAW];
            const int next = i + RAW - 1;
            fetch<FORWARD>(sh.raw[next % RAW], from, place, T, FORWARD ? next : last - next, next <= last,
                           PREPARING * 32);
            if (i <= last && (FORWARD || warp != K))
                scale<false>(warp, sh.x[i % 3][warp], raw.x[warp], raw.log_w, sh.decay[i % 3]);
            if (i >= 1 && i <= last + 1 && (FORWARD ? which <= AK : which == RB || which == INVERSE))
                relate(which, sh.m[(i - 1) % 2], sh.x[(i - 1) % 3], sh.scratch);
        }
        return;
    }
    Sum s[TILES];
    const int v0 = (blockIdx.z * (blockDim.x / 32 - PREPARING) + warp - PREPARING) * 16;
    load_state(s, start ? start + (place.head * N + v0) * N : nullptr);
    for (int i = -2; i <= last; i++) {
        __syncthreads();                            // the same
        if (i < 0)
            continue;
        const int chunk = FORWARD ? i : last - i;
        const Tensor* x = sh.x[i % 3];
        const Matrix* m = sh.m[i % 2];
        if (FORWARD) {
            input* to = y + place.origin + (long long)chunk * L * place.stride;
            step(s, x, m, sh.decay[i % 3], v0, to, place.stride, T - chunk * L,
                 checkpoints ? checkpoints + tile_at(place, chunk, v0 / 16, 0) : nullptr);
        } else {
            const long long at = place.head * (last / segment + 1) + chunk / segment;
            Left decayed[TILES];
            if ((chunk + 1) % segment == 0 && chunk < last)
                store_state(carry + (at * N + v0) * N, s);
            step_back(s, decayed, left_transposed(x[V] + v0, ROW), x, m, sh.decay[i % 3]);
        }
    }
    if (FORWARD)
        store_state(end + (place.head * N + v0) * N, s);
}

extern "C" __global__ void __launch_bounds__(32 * (PREPARING + TILES), SHARING ? 2 : 1) wkv_forward(
        int T, int H, const input* r, const float* log_w, const input* k, const input* v, const input* a,
        const input* b, const float* s0, input* y, float* sT, uint4* checkpoints) {
    chain<true>(T, H, 1, {{r, a, b, k, v}, log_w}, s0, y, sT, (Left*)checkpoints, nullptr);
}

extern "C" __global__ void __launch_bounds__(32 * (PREPARING + TILES), SHARING ? 2 : 1) wkv_backward_chain(
        int T, int H, int segment, const input* r, const float* log_w, const input* a, const input* b,
        const input* dy, const float* dsT, float* carry) {
    chain<false>(T, H, segment, {{r, a, b, nullptr, dy}, log_w}, dsT, nullptr, nullptr, nullptr, carry);
}

// ---- Part 5. Gradients -----------------------------------------------------------------------------------
// Of a chunk, given S0 (kept by the forward) and G = dLoss/dS_L; G~ = G diag(P_L) is before the decay:
//
//     U as before         dU = RB' dY + Bi G~'         dZ = M' dU         dV = RK' dY + Ki G~' + AK' dZ
//     dRB = dY U', dRK = dY V'  for s <= t             dAB = dZ U', dAK = dZ V'  for s < t
//     dR  = dY S0 + dRB Bi + dRK Ki                    dA  = dZ S0 + dAB Bi + dAK Ki
//     dBi = U G~ + dRB' R + dAB' A                     dKi = V G~ + dRK' R + dAK' A
//     dr_t = dR_t * P_t     da_t = dA_t * P_{t-1}      db_t = dBi_t / P_t       dk_t = dKi_t / P_t
//     dLoss/dS0 = G~ + dY' R + dZ' A
//
// log_w_t scales whatever crosses token t: all that reaches the end less what tokens from t on write of it,
// and what reads from t on find of earlier writes (not token t's own read with A, which is before the decay):
//
//     dlog_w_t = columnsum(S0 * G~) + sum_s (Bi * (U G~) + Ki * (V G~))_s - (A * dA)_t
//                + sum_{s >= t} (R * dR + A * dA - Bi * dBi - Ki * dKi)_s
//
// Large terms cancel here, and only because R, A, Bi, Ki are the rounded numbers that the products saw.
//
// A block goes from its segment's last chunk to the first, five barriers each: a phase needs what other warps
// wrote in the one before. The next chunk is in the air meanwhile, and four blocks share an SM of 228 KB.
struct BackwardShared {
    Raw<6> raw;                                     // the next chunk
    Tensor x[6];
    Tensor u;
    Tensor dz;
    bf16 g[N * ROW];                                // G~
    Matrix m[8];                                    // the first four are dRB, dRK, dAB, dAK later
    float decay[(L + 1) * ROW];                     // P_0 .. P_L
    float scratch[L * 20];
};

extern "C" { __constant__ int wkv_shared_bytes[2] = {sizeof(ChainShared), sizeof(BackwardShared)}; }

// 16 rows of S0 and G, by one warp: dv, and U, dZ, G~ for the others
DEVICE void gradient_rows(BackwardShared& sh, Sum* g, const Left* s0, int v0, input* dv_, int stride,
                          int tokens) {
    const Left v = left_transposed(sh.x[V] + v0, ROW);
    const Left dy = left_transposed(sh.x[DY] + v0, ROW);
    Left decayed[TILES];
    Sum z = {}, dv = {};
    UNROLL for (int j = 0; j < TILES; j++)
        add_product(z, s0[j], right_transposed(sh.x[A] + j * 16, ROW));
    store(sh.u + v0, ROW, transposed(rounded(moved(z, v, sh.m))));
    const Left dz = step_back(g, decayed, dy, sh.x, sh.m, sh.decay + L * ROW);
    store(sh.dz + v0, ROW, transposed(dz));
    UNROLL for (int j = 0; j < TILES; j++) {
        store(sh.g + v0 * ROW + j * 16, ROW, decayed[j]);
        add_product(dv, decayed[j], right_transposed(sh.x[K] + j * 16, ROW));
    }
    add_product(dv, dy, small(sh.m + RK));
    add_product(dv, dz, small(sh.m + AK));
    store_transposed(dv_ + v0, stride, dv, tokens);
}

// Key columns c0 .. c0 + 15, by one warp: dlog_w, and to[] = dr, da, db, dk
DEVICE void gradient_columns(const BackwardShared& sh, const Left* s0, int c0, int stride, int tokens,
                             input* const (&to)[4], float* dlog_w) {
    Sum d[4] = {};                                  // dR, dA, dBi, dKi
    Sum both = {};                                  // G~' S0; its diagonal is columnsum(S0 * G~)
    UNROLL for (int i = 0; i < TILES; i++) {
        const Right g = right(sh.g + i * 16 * ROW + c0, ROW);
        add_product(d[B], left(sh.u + i * 16, ROW), g);
        add_product(d[K], left(sh.x[V] + i * 16, ROW), g);
    }
    UNROLL for (int i = 0; i < TILES; i++) {        // apart, for s0 is on its way from memory
        const Right s = as_right(s0[i]);
        add_product(both, left_transposed(sh.g + i * 16 * ROW + c0, ROW), s);
        add_product(d[R], left(sh.x[DY] + i * 16, ROW), s);
        add_product(d[A], left(sh.dz + i * 16, ROW), s);
    }
    Left x[4];                                      // R, A, Bi, Ki: a Left has the numbers that a Sum has
    UNROLL for (int n = 0; n < 4; n++)
        x[n] = left(sh.x[n] + c0, ROW);
    Sum dw, writes;
    UNROLL for (int i = 0; i < 8; i++) {
        // column c = 8 (i / 4) + 2 q + i % 2 has its diagonal in lane (c % 8) 4 + q, number 6 (i / 4) + i % 2
        const int q = lane() % 4;
        dw.x[i] = __shfl_sync(~0u, both.x[i / 4 * 6 + i % 2], (q * 2 + i % 2) * 4 + q);
        writes.x[i] = number(x[B], i) * d[B].x[i] + number(x[K], i) * d[K].x[i];
    }
    UNROLL for (int i = 0; i < 4; i++) {            // dRB, dRK, dAB, dAK each serve both their factors
        const bf16* m = sh.m[i];
        add_product(d[R + i / 2], left(m, SMALL), right(sh.x[B + i % 2] + c0, ROW));
        add_product(d[B + i % 2], left_transposed(m, SMALL), right(sh.x[R + i / 2] + c0, ROW));
    }
    const Left ones = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    add_product(dw, ones, in_halves(writes));
    Sum crossing;
    Left from_here_on;                              // ones for s >= t
    UNROLL for (int i = 0; i < 8; i++) {
        const float* p = sh.decay + row_of(i) * ROW + c0 + column_of(i);
        const float inverse = reciprocal(p[ROW]);
        const float a_da = number(x[A], i) * d[A].x[i];
        const float b_db = number(x[B], i) * d[B].x[i];
        crossing.x[i] = number(x[R], i) * d[R].x[i] + a_da - b_db - number(x[K], i) * d[K].x[i];
        dw.x[i] -= a_da;
        d[R].x[i] *= p[ROW];
        d[A].x[i] *= p[0];
        d[B].x[i] *= inverse;
        d[K].x[i] *= inverse;
        from_here_on.x[i / 2] = pack(column_of(i & 6) >= row_of(i), column_of(i | 1) >= row_of(i));
    }
    add_product(dw, from_here_on, in_halves(crossing));
    UNROLL for (int i = 0; i < 8; i += 2)           // one index and one branch for all five
        if (row_of(i) < tokens) {
            const int at = row_of(i) * stride + c0 + column_of(i);
            UNROLL for (int n = 0; n < 4; n++)
                store_two(to[n] + at, d[n].x[i], d[n].x[i + 1]);
            store_two(dlog_w + at, dw.x[i], dw.x[i + 1]);
        }
}

extern "C" __global__ void __launch_bounds__(32 * TILES, SHARING ? 4 : 1) wkv_backward(
        int T, int H, int segment, const input* r, const float* log_w, const input* k, const input* v,
        const input* a, const input* b, const uint4* checkpoints, const input* dy, const float* dsT,
        const float* carry, input* dr, float* dlog_w, input* dk, input* dv, input* da, input* db,
        float* ds0) {
    BackwardShared& sh = *(BackwardShared*)shared_memory;
    const Place place = this_place(T, H);
    const int warp = threadIdx.x / 32;
    const int first = blockIdx.z * segment;
    const int last = min(place.chunks, first + segment) - 1;
    const Sources<6> from = {{r, a, b, k, v, dy}, log_w};
    const Left* kept = (const Left*)checkpoints;
    fetch<true>(sh.raw, from, place, T, last, true, 32 * TILES);
    Sum g[TILES];
    const bool from_later = blockIdx.z + 1 < gridDim.z;
    const float* flow = from_later ? carry : dsT;
    const long long index = from_later ? place.head * gridDim.z + blockIdx.z : place.head;
    load_state(g, flow ? flow + (index * N + warp * 16) * N : nullptr);
    for (int chunk = last; chunk >= first; chunk--) {
        const long long at = place.origin + (long long)chunk * L * place.stride;
        copy_wait<0>();
        __syncthreads();                            // the tokens have landed, the chunk after is done
        for (int i = warp; i < 6; i += TILES)
            scale<true>(i, sh.x[i], sh.raw.x[i], sh.raw.log_w, sh.decay);
        __syncthreads();
        fetch<true>(sh.raw, from, place, T, chunk - 1, chunk > first, 32 * TILES);
        Left s0[TILES];                             // this warp's rows of S0, later its columns
        UNROLL for (int i = 0; i < TILES; i++)
            s0[i] = kept[tile_at(place, chunk, warp, i)];
        for (int i = warp; i < 4; i += TILES)
            relate(i, sh.m, sh.x, sh.scratch);
        __syncthreads();
        gradient_rows(sh, g, s0, warp * 16, dv + at, place.stride, T - chunk * L);
        UNROLL for (int i = 0; i < TILES; i++)
            s0[i] = kept[tile_at(place, chunk, i, warp)];
        __syncthreads();
        for (int i = warp; i < 4; i += TILES) {
            const Sum sum = triangle(i / 2 ? sh.dz : sh.x[DY], i % 2 ? sh.x[V] : sh.u, i / 2);
            store(sh.m[i], SMALL, rounded(sum));
        }
        __syncthreads();
        gradient_columns(sh, s0, warp * 16, place.stride, T - chunk * L, {dr + at, da + at, db + at, dk + at},
                         dlog_w + at);
    }
    if (blockIdx.z == 0)
        store_state(ds0 + (place.head * N + warp * 16) * N, g);
}
