// Runs a CUDA kernel on the CPU: the file is compiled by g++ with this header in front (g++ -x c++ -include
// cuda_on_cpu.h), and every CUDA thread becomes a fiber, a stack of its own that gives way wherever the
// hardware could make it wait.
//
// What makes it a test rather than a port:
//   - which warp runs, and which lane of it first, is drawn at random from a seed: one warp may run a whole
//     phase before its neighbours have started, as a GPU may do it and as a fair schedule never does
//   - shared memory starts as NaN, and so does what a copy in the background has not yet brought
//   - a background copy lands either at once or at the last moment that its wait allows
//   - any one barrier or wait can be left out, by its line in the source, to see that some schedule notices
//   - a barrier that not every thread reaches, or a misaligned address, ends the launch with an error
// Not modelled: memory ordering between warps finer than a barrier, races between blocks, the tensor core's
// own rounding.
#pragma once
#define CUDA_ON_CPU
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __attribute__((section("cuda_shared")))

struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int min(int x, int y) { return x < y ? x : y; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }

// the kernel's dynamic shared memory goes by this name; as much as a block of an H100 may have
__shared__ __align__(128) unsigned char shared_memory[227 * 1024];
extern unsigned char __start_cuda_shared[], __stop_cuda_shared[];       // all __shared__ variables (linker)

namespace cuda_on_cpu {

// ---- fibers: a stack, and a switch that keeps the registers which a call must preserve
constexpr size_t STACK = 128 << 10;
#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
typedef void* Context;
extern "C" void cuda_on_cpu_switch(Context* save, Context* to);
asm(".text\n.globl cuda_on_cpu_switch\n.type cuda_on_cpu_switch,@function\ncuda_on_cpu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq (%rsi),%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nretq\n");
inline void switch_to(Context& save, Context& to) { cuda_on_cpu_switch(&save, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    void** top = (void**)(stack + STACK - 64);
    *--top = nullptr;                                   // entry sees the alignment of a called function
    *--top = (void*)entry;
    context = top - 6;
}
}
#else
}
#include <ucontext.h>
namespace cuda_on_cpu {
typedef ucontext_t Context;
inline void switch_to(Context& save, Context& to) { swapcontext(&save, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
}
#endif

namespace cuda_on_cpu {
enum State { READY, AT_BARRIER, IN_WARP, DONE };

struct Copy { void* to; const void* from; bool wanted; };

struct Fiber {
    Context context;
    char* stack;
    State state;
    std::vector<std::vector<Copy>> groups;              // copies in the air, oldest first, the last one open
};

struct Warp {                                           // an instruction that 32 lanes carry out together
    unsigned arrived;
    unsigned in[32][10];
    unsigned out[32][4];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Context scheduler;
inline std::function<void()> body;
inline dim3 block_index, block_size, grid_size;
inline unsigned current, at_barrier;
inline uint64_t random_state;
inline int dropped_line;
inline const char* failure;

inline unsigned draw() {                                // xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return unsigned(random_state >> 32);
}

inline void give_way() {
    switch_to(fibers[current].context, scheduler);
}

inline void fail(const char* why) {                     // the launch ends; this fiber never goes on
    failure = why;
    give_way();
}

inline void fiber_entry() {
    body();
    fibers[current].state = DONE;
    give_way();
}

// the last lane to arrive computes for all
template <class Compute> void together(const unsigned* in, int words, Compute compute) {
    Warp& warp = warps[current / 32];
    const unsigned first = current / 32 * 32;
    const unsigned lanes = block_size.x - first < 32 ? block_size.x - first : 32;
    for (int i = 0; i < words; i++)
        warp.in[current % 32][i] = in[i];
    if (++warp.arrived < lanes) {
        fibers[current].state = IN_WARP;
        give_way();
        return;
    }
    warp.arrived = 0;
    compute(warp);
    for (unsigned i = first; i < first + lanes; i++)
        if (fibers[i].state == IN_WARP)
            fibers[i].state = READY;
}

inline const unsigned* result() { return warps[current / 32].out[current % 32]; }

inline void land(const Copy& copy) {
    if (copy.wanted)
        memcpy(copy.to, copy.from, 16);
    else
        memset(copy.to, 0, 16);
}

inline void poison(unsigned char* from, unsigned char* to) {
    for (; from < to; from += 4)
        memcpy(from, "\xc1\xff\xc1\xff", 4);            // NaN as one fp32 and as two bf16
}

inline void run_block() {
    const unsigned threads = block_size.x;
    std::vector<unsigned> order(warps.size());
    std::vector<unsigned> ready;
    for (unsigned i = 0; i < order.size(); i++)
        order[i] = i;
    auto shuffle = [](std::vector<unsigned>& x) {
        for (size_t i = x.size(); i > 1; i--)
            std::swap(x[i - 1], x[draw() % i]);
    };
    shuffle(order);
    for (unsigned done = 0; done < threads && !failure;) {
        if (draw() % 16 == 0)                           // warps have priorities, redrawn now and then
            shuffle(order);
        ready.clear();
        for (unsigned warp : order) {
            for (unsigned i = warp * 32; i < threads && i < warp * 32 + 32; i++)
                if (fibers[i].state == READY)
                    ready.push_back(i);
            if (!ready.empty())
                break;
        }
        if (ready.empty()) {
            failure = "some threads wait for others that never come";
            break;
        }
        shuffle(ready);
        for (unsigned i : ready) {
            if (fibers[i].state != READY || failure)
                continue;
            current = i;
            switch_to(scheduler, fibers[i].context);
            done += fibers[i].state == DONE;
        }
    }
}

inline int launch(dim3 grid, dim3 block, size_t shared) {
    grid_size = grid;
    block_size = block;
    failure = nullptr;
    if (shared > sizeof shared_memory)
        failure = "more shared memory than a block may have";
    fibers.resize(block.x);
    warps.assign((block.x + 31) / 32, Warp{});
    for (Fiber& fiber : fibers)
        fiber.stack = (char*)aligned_alloc(64, STACK);
    for (unsigned i = 0; i < grid.x * grid.y * grid.z && !failure; i++) {
        block_index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        at_barrier = 0;
        poison(__start_cuda_shared, __stop_cuda_shared);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(shared_memory + shared, sizeof shared_memory - shared);
#endif
        for (Fiber& fiber : fibers) {
            fiber.state = READY;
            fiber.groups.assign(1, {});
            prepare(fiber.context, fiber.stack, fiber_entry);
        }
        run_block();
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(shared_memory, sizeof shared_memory);
#endif
    }
    for (Fiber& fiber : fibers)
        free(fiber.stack);
    fibers.clear();
    if (failure)
        fprintf(stderr, "cuda_on_cpu: %s (block %u, %u, %u)\n", failure, block_index.x, block_index.y,
                block_index.z);
    return failure != nullptr;
}

// the shape of cuLaunchKernel: an argument is a pointer to its value
template <class... Types, size_t... I>
int call(void (*kernel)(Types...), dim3 grid, dim3 block, size_t shared, void** arguments,
         std::index_sequence<I...>) {
    auto values = std::make_tuple(*(Types*)arguments[I]...);
    body = [=] { kernel(std::get<I>(values)...); };
    return launch(grid, block, shared);
}

template <class... Types>
int run(void (*kernel)(Types...), const unsigned* grid, unsigned block, size_t shared, void** arguments,
        uint64_t seed, int drop) {
    random_state = (seed + 1) * 0x9E3779B97F4A7C15ull;
    dropped_line = drop;
    const dim3 blocks = {grid[0], grid[1], grid[2]};
    return call(kernel, blocks, {block, 1, 1}, shared, arguments, std::index_sequence_for<Types...>{});
}
}  // namespace cuda_on_cpu

#define threadIdx dim3{cuda_on_cpu::current, 0, 0}
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
#define CUDA_ON_CPU_EXPORT(kernel) \
    extern "C" int run_##kernel(const unsigned* grid, unsigned block, size_t shared, void** arguments, \
                                uint64_t seed, int drop) { \
        return cuda_on_cpu::run(kernel, grid, block, shared, arguments, seed, drop); \
    }

// ---- barriers
inline void __syncthreads(int line = __builtin_LINE()) {
    using namespace cuda_on_cpu;
    if (line == dropped_line)
        return;
    fibers[current].state = AT_BARRIER;
    if (++at_barrier == block_size.x) {
        at_barrier = 0;
        for (Fiber& fiber : fibers)
            if (fiber.state == AT_BARRIER)
                fiber.state = READY;
    }
    give_way();
}

inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
    if (line != cuda_on_cpu::dropped_line)
        cuda_on_cpu::together(nullptr, 0, [](cuda_on_cpu::Warp&) {});
}

// ---- background copies
inline void copy_async(void* to, const void* from, bool wanted) {
    using namespace cuda_on_cpu;
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16)
        fail("copy_async needs 16-byte aligned addresses");
    if (draw() % 2)
        land({to, from, wanted});
    else
        fibers[current].groups.back().push_back({to, from, wanted});
}

inline void copy_commit() {
    cuda_on_cpu::fibers[cuda_on_cpu::current].groups.emplace_back();
}

template <int PENDING> void copy_wait(int line = __builtin_LINE()) {
    using namespace cuda_on_cpu;
    auto& groups = fibers[current].groups;
    if (line == dropped_line)
        return;
    while (groups.size() > PENDING + 1) {
        for (const Copy& copy : groups.front())
            land(copy);
        groups.erase(groups.begin());
    }
}

// ---- what the lanes of a warp do together
inline unsigned shuffle_from(unsigned value, unsigned source) {
    using namespace cuda_on_cpu;
    const unsigned in[2] = {value, source};
    together(in, 2, [](Warp& warp) {
        for (int i = 0; i < 32; i++)
            warp.out[i][0] = warp.in[warp.in[i][1] % 32][0];
    });
    return result()[0];
}

inline float __shfl_sync(unsigned, float x, unsigned source) {
    return __uint_as_float(shuffle_from(__float_as_uint(x), source));
}

inline unsigned pack(float low, float high) {                                   // round to nearest even
    auto round = [](float x) {
        const unsigned u = __float_as_uint(x);
        return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }

// d (16 x 8) += a (16 x 16) b (16 x 8), the register layout of PTX mma.m16n8k16
inline void mma(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    using namespace cuda_on_cpu;
    unsigned in[10] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(in + 6, d, 16);
    together(in, 10, [](Warp& warp) {
        float x[16][16], y[16][8], sum[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const unsigned* words = warp.in[lane];
            const int g = lane / 4, q = lane % 4;
            for (int i = 0; i < 4; i++)
                for (int half = 0; half < 2; half++)
                    x[g + i % 2 * 8][i / 2 * 8 + q * 2 + half] = __uint_as_float(words[i] >> 16 * half << 16);
            for (int i = 0; i < 2; i++)
                for (int half = 0; half < 2; half++)
                    y[i * 8 + q * 2 + half][g] = __uint_as_float(words[4 + i] >> 16 * half << 16);
            for (int e = 0; e < 4; e++)
                sum[g + e / 2 * 8][q * 2 + e % 2] = __uint_as_float(words[6 + e]);
        }
        for (int m = 0; m < 16; m++)
            for (int k = 0; k < 16; k++)
                for (int n = 0; n < 8; n++)
                    sum[m][n] += x[m][k] * y[k][n];
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 4; e++)
                warp.out[lane][e] = __float_as_uint(sum[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
    });
    memcpy(d, result(), 16);
}

// four 8 x 8 blocks of bf16: lane i names row i % 8 of block i / 8 (PTX ldmatrix)
template <typename Factor, bool TRANSPOSED> Factor load_blocks(const void* row) {
    using namespace cuda_on_cpu;
    if ((uintptr_t)row % 16)
        fail("a row of a block needs a 16-byte aligned address");
    unsigned in[2];
    memcpy(in, &row, 8);
    together(in, 2, [](Warp& warp) {
        for (int block = 0; block < 4; block++) {
            unsigned short m[8][8];
            for (int i = 0; i < 8; i++) {
                const unsigned short* from;
                memcpy(&from, warp.in[block * 8 + i], 8);
                for (int j = 0; j < 8; j++)
                    (TRANSPOSED ? m[j][i] : m[i][j]) = from[j];
            }
            for (int lane = 0; lane < 32; lane++)
                memcpy(&warp.out[lane][block], &m[lane / 4][lane % 4 * 2], 4);
        }
    });
    Factor t;
    memcpy(t.x, result(), 16);
    return t;
}

inline unsigned transpose_block(unsigned x) {
    using namespace cuda_on_cpu;
    together(&x, 1, [](Warp& warp) {
        unsigned short m[8][8];
        for (int lane = 0; lane < 32; lane++)
            for (int half = 0; half < 2; half++)
                m[lane % 4 * 2 + half][lane / 4] = warp.in[lane][0] >> 16 * half;
        for (int lane = 0; lane < 32; lane++)
            memcpy(&warp.out[lane][0], &m[lane / 4][lane % 4 * 2], 4);
    });
    return result()[0];
}
