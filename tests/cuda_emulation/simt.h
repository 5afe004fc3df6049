// CUDA on a CPU, as far as ggml's decode and quantise kernels need it: each thread of a block is a fiber, blocks run
// one after another. A fiber runs until it meets its warp (shuffle, vote, __syncwarp) or its block (__syncthreads);
// a barrier that part of the live threads never reach is an error. Device memory is the heap, so that
// AddressSanitizer sees every access; static shared memory is a static variable, dynamic shared memory a heap block.
//
// The kernels are compiled as for compute capability 7.0: __dp4a and half arithmetic, no tensor cores, no PDL.
// translate() in test_cuda_emulation.py turns kernel<<<grid, block, shared, stream>>>(args) into simt::Launch{...}.run(kernel, args).
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "ggml.h"

#define CUDART_VERSION 11060 // before PDL, CUB, FP8 and FP4
#define GGML_CUDA_NO_VMM

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __builtin_assume(x)
#define __CUDA_ARCH__ 700

// ---------------------------------------------------------------------------------------------------- vector types

template <typename T> struct vec2 { T x, y; };
template <typename T> struct vec3 { T x, y, z; };
template <typename T> struct alignas(4 * sizeof(T)) vec4 { T x, y, z, w; };
using char2  = vec2<int8_t>;
using int2   = vec2<int>;
using uint2  = vec2<uint32_t>;
using float2 = vec2<float>;
using uint3  = vec3<uint32_t>;
using char4  = vec4<int8_t>;
using uchar4 = vec4<uint8_t>;
using int4   = vec4<int>;
using uint4  = vec4<uint32_t>;
using float4 = vec4<float>;
struct dim3 {
    uint32_t x, y, z;
    constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
inline int2   make_int2(int x, int y) { return {x, y}; }
inline uint2  make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint3  make_uint3(uint32_t x, uint32_t y, uint32_t z) { return {x, y, z}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline char4  make_char4(int8_t x, int8_t y, int8_t z, int8_t w) { return {x, y, z, w}; }

// ------------------------------------------------------------------------------------- half and bfloat16, by way of float

struct half {
    uint16_t bits;
    half() = default;
    half(float value) : bits(ggml_fp32_to_fp16(value)) {}
    operator float() const { return ggml_fp16_to_fp32(bits); }
};
struct nv_bfloat16 {
    uint16_t bits;
    nv_bfloat16() = default;
    nv_bfloat16(float value) : bits(ggml_fp32_to_bf16(value).bits) {}
    operator float() const { return ggml_bf16_to_fp32({bits}); }
};
struct alignas(4) half2 { half x, y; };
struct alignas(4) nv_bfloat162 { nv_bfloat16 x, y; };
using __half = half;
using __half2 = half2;
using __nv_bfloat16 = nv_bfloat16;
using __nv_bfloat162 = nv_bfloat162;
inline half2   operator+(half2 a, half2 b) { return {float(a.x) + float(b.x), float(a.y) + float(b.y)}; }
inline half2   operator*(half2 a, half2 b) { return {float(a.x) * float(b.x), float(a.y) * float(b.y)}; }
inline half2 & operator+=(half2 & a, half2 b) { return a = a + b; }
inline half2   make_half2(float x, float y) { return {x, y}; }
inline half    __float2half(float x) { return x; }
inline float   __half2float(half x) { return x; }
inline float   __low2float(half2 x) { return x.x; }
inline float   __high2float(half2 x) { return x.y; }
inline half    __low2half(half2 x) { return x.x; }
inline half    __high2half(half2 x) { return x.y; }
inline float2  __half22float2(half2 x) { return {x.x, x.y}; }
inline half2   __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline half2   __hadd2(half2 a, half2 b) { return a + b; }
inline half2   __hmul2(half2 a, half2 b) { return a * b; }
inline half    __hmax(half a, half b) { return fmaxf(a, b); }
inline half2   __hmax2(half2 a, half2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }
inline float   __bfloat162float(nv_bfloat16 x) { return x; }
inline nv_bfloat16 __float2bfloat16(float x) { return x; }
inline float2  __bfloat1622float2(nv_bfloat162 x) { return {x.x, x.y}; }
inline nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }

// ---------------------------------------------------------------------------------------------------- integer intrinsics

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline int      __popc(uint32_t x) { return __builtin_popcount(x); }
inline int      __float2int_rn(float x) { return int(nearbyintf(x)); }
inline float    __frcp_rn(float x) { return 1.0f / x; }
inline float    __expf(float x) { return expf(x); }
[[noreturn]] inline void __trap() { abort(); }
using std::max;
using std::min;
inline uint32_t min(uint32_t a, int b) { return a < uint32_t(b) ? a : uint32_t(b); }

namespace simt {
template <typename Lane, typename F> uint32_t per_byte(uint32_t a, uint32_t b, F f) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 8) {
        result |= uint32_t(uint8_t(f(Lane(a >> shift), Lane(b >> shift)))) << shift;
    }
    return result;
}
} // namespace simt

inline int __dp4a(int a, int b, int c) {
    for (int shift = 0; shift < 32; shift += 8) {
        c += int8_t(a >> shift) * int8_t(b >> shift);
    }
    return c;
}
inline uint32_t __vsub4(uint32_t a, uint32_t b) {
    return simt::per_byte<int8_t>(a, b, [](int x, int y) { return x - y; });
}
inline uint32_t __vsubss4(uint32_t a, uint32_t b) {
    return simt::per_byte<int8_t>(a, b, [](int x, int y) { return max(-128, min(127, x - y)); });
}
inline uint32_t __vcmpne4(uint32_t a, uint32_t b) {
    return simt::per_byte<uint8_t>(a, b, [](int x, int y) { return x != y ? 0xFF : 0; });
}
inline uint32_t __vcmpeq4(uint32_t a, uint32_t b) { return ~__vcmpne4(a, b); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t selector = selectors >> 4 * i & 0xF;
        const uint8_t byte = bytes >> 8 * (selector & 7);
        result |= uint32_t(selector & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << 8 * i;
    }
    return result;
}

// ------------------------------------------------------------------------------------------------- threads, warps, blocks

inline uint3 threadIdx, blockIdx;
inline dim3  blockDim, gridDim;

namespace simt {

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;

struct Barrier {
    int live = 0, arrived = 0;
    unsigned generation = 0;

    void release_if_complete() {
        if (live > 0 && arrived == live) {
            arrived = 0;
            ++generation;
        }
    }
};

struct Warp {
    Barrier barrier;
    struct Slots {
        uint64_t value[WARP];
        int turn[WARP]; // which exchange the value belongs to: lanes that have returned take no part
    };
    Slots slots[2] = {}; // by turns: a lane may be one exchange ahead of another
};

struct Fiber {
    ucontext_t context;
    char * stack;
    void * fake_stack = nullptr;
    uint3 index;
    int number, turn = 0;
    bool done = false;
    Barrier * waits_at = nullptr;
    unsigned generation = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    ucontext_t scheduler;
    void * scheduler_fake_stack = nullptr;
    const void * scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    Fiber * running = nullptr;
    const std::function<void()> * body = nullptr;
    char * dynamic_shared = nullptr;
};
inline Block block;

inline char * stack_of(int number) {
    static std::vector<char *> stacks;
    while (int(stacks.size()) <= number) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        stacks.push_back((char *) mmap(nullptr, STACK, PROT_READ | PROT_WRITE, flags, -1, 0));
    }
    return stacks[number];
}

inline void to_scheduler(Fiber & me) {
    void ** keep = me.done ? nullptr : &me.fake_stack;
    __sanitizer_start_switch_fiber(keep, block.scheduler_stack, block.scheduler_stack_size);
    swapcontext(&me.context, &block.scheduler);
    __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
}

inline void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
    Fiber & me = *block.running;
    (*block.body)();
    me.done = true;
    Warp & warp = block.warps[me.number / WARP];
    for (Barrier * barrier : {&warp.barrier, &block.barrier}) {
        --barrier->live;
        barrier->release_if_complete();
    }
    to_scheduler(me);
}

inline void resume(Fiber & fiber) {
    block.running = &fiber;
    threadIdx = fiber.index;
    __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack, STACK);
    swapcontext(&block.scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
}

inline void meet(Barrier & barrier) {
    Fiber & me = *block.running;
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    barrier.release_if_complete();
    if (barrier.generation == generation) {
        me.waits_at = &barrier;
        me.generation = generation;
        to_scheduler(me);
    }
}

inline void run_block(const std::function<void()> & body, size_t n_shared) {
    const int n = blockDim.x * blockDim.y * blockDim.z;
    const std::unique_ptr<char[]> shared(new char[n_shared]);
    block.dynamic_shared = shared.get();
    memset(block.dynamic_shared, 0xFF, n_shared); // not numbers
    block.body = &body;
    block.warps.assign((n + WARP - 1) / WARP, Warp{});
    block.barrier = {n};
    block.fibers.resize(n);
    for (int i = 0; i < n; ++i) {
        Fiber & fiber = block.fibers[i];
        fiber.number = i;
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        fiber.done = false;
        fiber.turn = 0;
        fiber.waits_at = nullptr;
        fiber.fake_stack = nullptr;
        fiber.stack = stack_of(i);
        __asan_unpoison_memory_region(fiber.stack + STACK - 4096, 4096);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, enter, 0);
        fiber.context.uc_stack.ss_size = 0; // else AddressSanitizer unpoisons the whole stack at each switch
        ++block.warps[i / WARP].barrier.live;
    }
    for (bool alive = true, progress = true; alive; progress = false) {
        alive = false;
        for (Fiber & fiber : block.fibers) {
            if (!fiber.done && !(fiber.waits_at && fiber.waits_at->generation == fiber.generation)) {
                fiber.waits_at = nullptr;
                resume(fiber);
                progress = true;
            }
            alive = alive || !fiber.done;
        }
        if (alive && !progress) {
            fprintf(stderr, "block %u,%u,%u: some threads wait for others that never come\n", blockIdx.x, blockIdx.y, blockIdx.z);
            abort();
        }
    }
}

struct Launch {
    dim3 grid, threads;
    size_t n_shared = 0;
    void * stream = nullptr;

    template <typename K, typename... A> void run(K kernel, A &&... args) const {
        const std::function<void()> body = [&] { kernel(args...); };
        gridDim  = grid;
        blockDim = threads;
        for (uint32_t z = 0; z < grid.z; ++z) {
            for (uint32_t y = 0; y < grid.y; ++y) {
                for (uint32_t x = 0; x < grid.x; ++x) {
                    blockIdx = {x, y, z};
                    run_block(body, n_shared);
                }
            }
        }
    }
};

// Each lane of the warp gives a value; the slots hold all of them until the next but one exchange.
template <typename T> const Warp::Slots & exchange(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    Fiber & me = *block.running;
    Warp & warp = block.warps[me.number / WARP];
    Warp::Slots & slots = warp.slots[++me.turn % 2];
    memcpy(&slots.value[me.number % WARP], &value, sizeof(T));
    slots.turn[me.number % WARP] = me.turn;
    meet(warp.barrier);
    return slots;
}

template <typename T> T value_of(const Warp::Slots & slots, int lane) {
    T value;
    memcpy(&value, &slots.value[lane], sizeof(T));
    return value;
}

inline int lane() { return block.running->number % WARP; }

} // namespace simt

inline void __syncthreads() { simt::meet(simt::block.barrier); }
inline void __syncwarp(unsigned = ~0u) { simt::exchange(0); }

template <typename T> T __shfl_sync(unsigned, T value, int source, int width = 32) {
    const int first = simt::lane() / width * width;
    return simt::value_of<T>(simt::exchange(value), first + source % width);
}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    const int me = simt::lane(), other = me ^ mask;
    return simt::value_of<T>(simt::exchange(value), other / width == me / width ? other : me);
}
template <typename T> T __shfl_up_sync(unsigned, T value, int delta, int width = 32) {
    const int me = simt::lane();
    return simt::value_of<T>(simt::exchange(value), me % width >= delta ? me - delta : me);
}
inline int __any_sync(unsigned, int predicate) {
    const simt::Warp::Slots & slots = simt::exchange<uint64_t>(predicate != 0);
    bool any = false;
    for (int lane = 0; lane < simt::WARP; ++lane) {
        any = any || (slots.turn[lane] == simt::block.running->turn && slots.value[lane] != 0);
    }
    return any;
}
inline int __all_sync(unsigned mask, int predicate) { return !__any_sync(mask, !predicate); }

// --------------------------------------------------------------------------------------------------------------- the host

enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaEventDisableTiming, cudaStreamNonBlocking };
using cudaStream_t = void *;
using cudaEvent_t = void *;
inline const char * cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void * data, int value, size_t n, cudaStream_t) {
    memset(data, value, n);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t n, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, n);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, int) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, int) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
template <typename K> cudaError_t cudaFuncSetAttribute(K, int, size_t) { return cudaSuccess; }

// cuBLAS is declared, as common.cuh mentions it, and never linked
using cublasHandle_t = void *;
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_NOT_INITIALIZED, CUBLAS_STATUS_ALLOC_FAILED, CUBLAS_STATUS_INVALID_VALUE,
    CUBLAS_STATUS_ARCH_MISMATCH, CUBLAS_STATUS_MAPPING_ERROR, CUBLAS_STATUS_EXECUTION_FAILED, CUBLAS_STATUS_INTERNAL_ERROR,
    CUBLAS_STATUS_NOT_SUPPORTED,
};
enum { CUBLAS_TF32_TENSOR_OP_MATH };
cublasStatus_t cublasCreate(cublasHandle_t *);
cublasStatus_t cublasSetMathMode(cublasHandle_t, int);
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t);
