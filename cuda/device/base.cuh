// Thin wrappers over what only a GPU has. Kernels use these, so that they also compile for the
// emulator, which runs them on the host.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define DEVICE __device__ __forceinline__
#else
#include "emulator.h"
#endif

// Storage types: a register of bits, widened before any arithmetic.
struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

// What sums of an element type run in: float, or double for double.
template <typename T> struct AccumulatorOf {
    using Type = float;
};
template <> struct AccumulatorOf<double> {
    using Type = double;
};
template <typename T> using Accumulator = typename AccumulatorOf<T>::Type;

#ifdef __CUDACC__
DEVICE float widen(Bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
DEVICE float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE void round_to(Bf16& y, float x) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
DEVICE void round_to(F16& y, float x) { y.bits = __half_as_ushort(__float2half_rn(x)); }
// Every lane of the warp must call it.
template <typename T> DEVICE T shuffle_xor(T x, int lanes) {
    return __shfl_xor_sync(0xffffffffu, x, lanes);
}
// Every thread of the block must call it.
DEVICE void block_barrier() { __syncthreads(); }
#else
inline float widen(Bf16 x) { return emulator::bf16_to_float(x.bits); }
inline float widen(F16 x) { return emulator::f16_to_float(x.bits); }
inline void round_to(Bf16& y, float x) { y.bits = emulator::float_to_bf16(x); }
inline void round_to(F16& y, float x) { y.bits = emulator::float_to_f16(x); }
template <typename T> T shuffle_xor(T x, int lanes) { return emulator::shuffle_xor(x, lanes); }
inline void block_barrier() { emulator::block_barrier(); }
#endif
DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE void round_to(float& y, float x) { y = x; }
DEVICE void round_to(double& y, double x) { y = x; }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// N elements that move as one load or store.
template <typename T, int N> struct alignas(N * sizeof(T)) Vector {
    T at[N];
};

// Sum over the block in a fixed order: halves of each warp, then warp after warp. Every thread must
// call it, with blockDim.x a multiple of 32; thread 0 gets the sum.
template <typename T> DEVICE T block_sum(T x) {
    __shared__ T sum_of_warp[32];
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x += shuffle_xor(x, lanes);
    }
    if (threadIdx.x % 32 == 0) {
        sum_of_warp[threadIdx.x / 32] = x;
    }
    block_barrier();
    T sum = 0;
    if (threadIdx.x == 0) {
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
            sum += sum_of_warp[warp];
        }
    }
    return sum;
}
