// What every kernel includes: CUDA under nvcc, and the same names on a CPU under the host shim.
//
//   bf16, half, to_float(x), from_float<io>(x)    element types; rounding to nearest even
//   pack2(low, high)                              two bf16 in a register
//   exp2_approx(x), reciprocal_approx(x)          one instruction each, within 2 ulp and 1; below 2^-126 the result is 0
//   mma_16816(c, a, b)                            c += a b, [16,16] x [16,8] bf16, fp32 sums; layout: host/shim.hpp
//   ldmatrix(to, row), ldmatrix_transposed        four 8 x 8 matrices from shared memory to fragments
//   dynamic_memory<T>()                           the block's dynamic shared memory
//   launch(kernel, grid, block, bytes, stream, ..) RWKV_OK or a status
//   holds_blocks(bytes, blocks)                   whether a multiprocessor has so much dynamic shared memory
#pragma once

#include <stddef.h>

#include "../wkv.h"

namespace rwkv {

constexpr size_t MOST_SHARED_BYTES = 99 << 10;      // that a block has on every architecture
constexpr size_t MOST_SHARED_BYTES_90 = 227 << 10;  // and on sm_90 and sm_100

}  // namespace rwkv

#ifdef RWKV_HOST_SHIM
#include "../host/shim.hpp"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace rwkv {

using bf16 = __nv_bfloat16;
using half = ::half;

__device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}

__device__ __forceinline__ float to_float(half x) {
    return __half2float(x);
}

__device__ __forceinline__ bf16 to_bf16(float x) {
    return __float2bfloat16_rn(x);
}

__device__ __forceinline__ half to_half(float x) {
    return __float2half_rn(x);
}

__device__ __forceinline__ uint32_t pack2(bf16 low, bf16 high) {
    return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void ldmatrix(uint32_t (&to)[4], const bf16 *row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[4], const bf16 *row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

template <typename T>
__device__ __forceinline__ T *dynamic_memory() {
    extern __shared__ __align__(16) unsigned char rwkv_dynamic_memory[];
    return reinterpret_cast<T *>(rwkv_dynamic_memory);
}

constexpr size_t DYNAMIC_BYTES_WITHOUT_ASKING = 48 << 10;

template <size_t most_bytes = MOST_SHARED_BYTES, typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes, void *stream,
               Arguments... arguments) {
    cudaError_t error = cudaSuccess;
    if (dynamic_bytes > DYNAMIC_BYTES_WITHOUT_ASKING) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(dynamic_bytes));
    }
    if (error == cudaSuccess) {
        kernel<<<grid, block, dynamic_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    }
    const cudaError_t last = cudaGetLastError();  // always: what stays there would be the next launch's
    if (error == cudaSuccess) error = last;
    return error == cudaSuccess ? RWKV_OK : RWKV_CUDA_ERROR + static_cast<int32_t>(error);
}

// Of the current device. One that does not tell holds none.
inline bool holds_blocks(size_t dynamic_bytes, int blocks) {
    int device, bytes, reserved;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    const auto ask = [device](int &value, cudaDeviceAttr attribute) {
        return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    };
    return ask(bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor) &&
           ask(reserved, cudaDevAttrReservedSharedMemoryPerBlock) &&
           blocks * (dynamic_bytes + reserved) <= static_cast<size_t>(bytes);
}

}  // namespace rwkv

#endif

namespace rwkv {

__device__ __forceinline__ float to_float(float x) {
    return x;
}

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float exp_approx(float x) {
    return exp2_approx(x * LOG2_E);
}

// The float with these bits: a bf16's, shifted up by 16.
__device__ __forceinline__ float bf16_bits_to_float(uint32_t bits) {
    return __uint_as_float(bits);
}

template <typename io>
__device__ __forceinline__ io from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return to_bf16(x);
}

template <>
__device__ __forceinline__ half from_float<half>(float x) {
    return to_half(x);
}

}  // namespace rwkv
