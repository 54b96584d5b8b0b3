/* A libcuda.so.1 for wkv_cuda.py, with the prototypes of cuda.h, on a machine without a GPU.

It refuses what the real driver would refuse. A launch lays its arguments out as the compiled kernel's own
list of parameters says (the test reads it from the cubin) and hands them to the test, which runs the kernel
on the CPU. Every handle and address is longer than 32 bits, so that one cut short by ctypes is seen.
The name of an error, for cuGetErrorName, is a sentence that says what was refused. */

#include <stdint.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef struct context *CUcontext;
typedef struct module *CUmodule;
typedef struct function *CUfunction;
typedef struct stream *CUstream;
typedef unsigned long long CUdeviceptr;
typedef int CUfunction_attribute;

#define CONTEXT ((CUcontext)0x5555deadbeef7770ull)
#define MODULE ((CUmodule)0x5555aaaabbbb0010ull)
#define GLOBAL 0x7f1234567890ull                 /* where wkv_shared_bytes lies on the device */
#define MOST_PARAMETERS 32
#define KERNELS 4
enum { INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, MISALIGNED_ADDRESS = 716 };

struct function {
    char name[64];
    int parameters, offset[MOST_PARAMETERS], size[MOST_PARAMETERS];
    int most_threads, static_shared;
    int opted_in;                                /* bytes of dynamic shared memory, set as an attribute */
};

/* what the test tells about the cubin, and what it gets back */
typedef int (*Launch)(const char *name, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared,
                      void **arguments);
static struct function functions[KERNELS];
static int count;
static int shared_bytes[2];
static CUstream expected_stream;
static Launch launch;
static int initialized;
static _Thread_local CUcontext current;          /* a context is current in one thread */
static const char *reason = "none";

void fake_start(Launch callback, uint64_t stream, int rows_shared, int gradients_shared) {
    launch = callback;
    expected_stream = (CUstream)stream;
    shared_bytes[0] = rows_shared;
    shared_bytes[1] = gradients_shared;
    initialized = count = 0;
    current = 0;
}

void fake_kernel(const char *name, int parameters, const int *offset, const int *size, int most_threads,
                 int static_shared) {
    struct function *f = &functions[count++];
    memset(f, 0, sizeof *f);
    strcpy(f->name, name);
    f->parameters = parameters;
    memcpy(f->offset, offset, parameters * sizeof *offset);
    memcpy(f->size, size, parameters * sizeof *size);
    f->most_threads = most_threads;
    f->static_shared = static_shared;
}

static CUresult refuse(CUresult error, const char *why) {
    reason = why;
    return error;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = reason;
    return 0;
}

CUresult cuInit(unsigned flags) {
    initialized = 1;
    return flags ? refuse(INVALID_VALUE, "the flags of cuInit must be 0") : 0;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    if (!initialized)
        return refuse(NOT_INITIALIZED, "cuInit comes first");
    *device = 0;
    return ordinal ? refuse(INVALID_DEVICE, "there is one device, 0") : 0;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = CONTEXT;
    return device ? refuse(INVALID_DEVICE, "there is one device, 0") : 0;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    return context != CONTEXT ? refuse(INVALID_CONTEXT, "no such context") : 0;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    const int machine = *(const uint16_t *)((const char *)image + 18);
    *module = MODULE;
    if (!current)
        return refuse(INVALID_CONTEXT, "no context is current in this thread");
    if (memcmp(image, "\177ELF", 4) || machine != 190)
        return refuse(INVALID_IMAGE, "not an ELF file for CUDA");
    return 0;
}

CUresult cuModuleGetGlobal_v2(CUdeviceptr *address, size_t *bytes, CUmodule module, const char *name) {
    *address = GLOBAL;
    *bytes = sizeof shared_bytes;
    if (module != MODULE)
        return refuse(INVALID_HANDLE, "no such module");
    return strcmp(name, "wkv_shared_bytes") ? refuse(NOT_FOUND, "no such global") : 0;
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    if (from != GLOBAL || bytes != sizeof shared_bytes)
        return refuse(INVALID_VALUE, "not the address or the size of the global");
    memcpy(to, shared_bytes, bytes);
    return 0;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (module != MODULE)
        return refuse(INVALID_HANDLE, "no such module");
    for (int i = 0; i < count; i++)
        if (!strcmp(functions[i].name, name)) {
            *function = &functions[i];
            return 0;
        }
    return refuse(NOT_FOUND, "no such kernel");
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
    if (attribute != 8)
        return refuse(INVALID_VALUE, "not the attribute for dynamic shared memory");
    if (value < 0 || value + f->static_shared > 227 * 1024)
        return refuse(INVALID_VALUE, "more shared memory than an H100 has");
    f->opted_in = value;
    return 0;
}

CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned threads,
                        unsigned threads_y, unsigned threads_z, unsigned shared, CUstream stream,
                        void **values, void **extra) {
    static _Thread_local _Alignas(16) unsigned char parameters[4096];
    void *arguments[MOST_PARAMETERS];
    if (current != CONTEXT)
        return refuse(INVALID_CONTEXT, "no context is current in this thread");
    if (stream != expected_stream)
        return refuse(INVALID_HANDLE, "not torch's current stream");
    if (extra)
        return refuse(INVALID_VALUE, "arguments come twice");
    if (!x || !y || !z || y > 65535 || z > 65535)
        return refuse(INVALID_VALUE, "a grid out of range");
    if (!threads || (int)threads > f->most_threads || threads_y != 1 || threads_z != 1)
        return refuse(INVALID_VALUE, "more threads than the kernel was compiled for");
    if (shared > 48 * 1024 && (int)shared > f->opted_in)
        return refuse(INVALID_VALUE, "more shared memory than was opted in");
    memset(parameters, 0xee, sizeof parameters);
    for (int i = 0; i < f->parameters; i++) {
        arguments[i] = memcpy(parameters + f->offset[i], values[i], f->size[i]);
        const int is_pointer = f->size[i] == 8;
        if (is_pointer && *(uint64_t *)arguments[i] % 16)
            return refuse(MISALIGNED_ADDRESS, "a pointer that is not 16-byte aligned");
    }
    current = 0;                                 /* the next launch may come from another thread */
    if (launch(f->name, x, y, z, threads, shared, arguments))
        return refuse(INVALID_VALUE, "the kernel did not finish");
    return 0;
}
