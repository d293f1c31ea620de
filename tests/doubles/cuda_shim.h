// CUDA's words for g++: one thread at a time on the CPU. No __shared__ and no __syncthreads: a kernel that needs them
// does not compile here, since threads run one after the other.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 530

struct dim3 { unsigned x, y, z; };
typedef dim3 uint3;
static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uchar3 { unsigned char x, y, z; };
struct uchar4 { unsigned char x, y, z, w; };
struct float2 { float x, y; };
struct float3 { float x, y, z; };
struct float4 { float x, y, z, w; };
static inline uchar3 make_uchar3(int x, int y, int z) { return {(unsigned char)x, (unsigned char)y, (unsigned char)z}; }
static inline uchar4 make_uchar4(int x, int y, int z, int w) {
    return {(unsigned char)x, (unsigned char)y, (unsigned char)z, (unsigned char)w};
}
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B> static inline typename std::common_type<A, B>::type min(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B> static inline typename std::common_type<A, B>::type max(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    return T(a) < T(b) ? T(b) : T(a);
}
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define __expf expf  // the C library has a name like it
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN gives 0, as on the GPU
static inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
static inline int __float2int_rd(float x) { return (int)floorf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
// one rounding each, never a fused multiply-add: kernels.py compiles with -ffp-contract=off
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T atomicAdd(T *p, T v) { T old = *p; *p += v; return old; }
template <class T> static inline T atomicMax(T *p, T v) { T old = *p; *p = max(old, v); return old; }

// IEEE half: 1 sign, 5 exponent, 10 mantissa bits; rounds to nearest, ties to even
struct __half { uint16_t bits; };
typedef __half half;
static inline __half __float2half_rn(float value) {
    uint32_t f;
    memcpy(&f, &value, 4);
    uint32_t sign = (f >> 16) & 0x8000u, magnitude = f & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {(uint16_t)(sign | 0x7fffu)};   // NaN
    if (magnitude >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};  // 65520 and above: infinity
    if (magnitude < 0x38800000u) {                                      // below 2^-14: the sum rounds to steps of 2^-24
        float small;
        memcpy(&small, &magnitude, 4);
        small += 0.5f;
        memcpy(&magnitude, &small, 4);
        return {(uint16_t)(sign | (magnitude - 0x3f000000u))};
    }
    return {(uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}
static inline __half __float2half(float value) { return __float2half_rn(value); }
static inline float __half2float(__half half) {
    uint32_t sign = (half.bits & 0x8000u) << 16, exponent = (half.bits >> 10) & 31u, mantissa = half.bits & 0x3ffu, f;
    if (exponent == 0) {
        float small = mantissa * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -small : small;
    }
    f = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &f, 4);
    return value;
}

// what the Python side reads: 'P' for a pointer, else the kind and the bytes, as in numpy
template <class T> static inline std::string parameter_code() {
    if (std::is_pointer<T>::value) return "P";
    const char *kind = std::is_floating_point<T>::value ? "f" : std::is_same<T, bool>::value ? "b"
                     : std::is_signed<T>::value ? "i" : std::is_unsigned<T>::value ? "u" : "V";
    return kind + std::to_string(sizeof(T));
}
template <class... A> static const char *describe(void (*)(A...)) {
    static std::string text;
    text.clear();
    for (const std::string &code : {std::string(), parameter_code<typename std::decay<A>::type>()...}) text += code + " ";
    return text.c_str();
}
template <class... A, size_t... I>
static void run_kernel(void (*kernel)(A...), const unsigned *n, void **args, std::index_sequence<I...>) {
    gridDim = {n[0], n[1], n[2]};
    blockDim = {n[3], n[4], n[5]};
    for (blockIdx.z = 0; blockIdx.z < n[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < n[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < n[0]; blockIdx.x++)
                for (threadIdx.z = 0; threadIdx.z < n[5]; threadIdx.z++)
                    for (threadIdx.y = 0; threadIdx.y < n[4]; threadIdx.y++)
                        for (threadIdx.x = 0; threadIdx.x < n[3]; threadIdx.x++)
                            kernel(*(typename std::decay<A>::type *)args[I]...);
}
template <class... A> static void launch(void (*kernel)(A...), const unsigned *sizes, void **args) {
    run_kernel(kernel, sizes, args, std::index_sequence_for<A...>());
}
#define EXPORT_KERNEL(name) \
    extern "C" const char *describe_##name() { return describe(name); } \
    extern "C" void launch_##name(const unsigned *sizes, void **args) { launch(name, sizes, args); }
