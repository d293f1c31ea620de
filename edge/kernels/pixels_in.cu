// From a picture on the device, (height, width, 3) bytes, to a net's input. One thread per pixel of the result: x, y.
// Each kernel equals its numpy twin bit for bit; __fmul_rn and __fadd_rn stay two roundings, where * and + would become one.
#include <cuda_fp16.h>

// edge.geometry.reflect
static __device__ int reflect(int index, int size) {
    if (size == 1) return 0;
    int period = 2 * (size - 1);
    int folded = (index < 0 ? -index : index) % period;
    return folded < period - folded ? folded : period - folded;
}

static __device__ void put(float *at, float value) { *at = value; }
static __device__ void put(__half *at, float value) { *at = __float2half_rn(value); }

template <class T>
static __device__ void prepare(const unsigned char *picture, int height, int width, int y0, int x0, int side,
                               const float (&scale)[3], const float (&shift)[3], T *out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= side || y >= side) return;
    const unsigned char *pixel = picture + 3 * ((size_t)reflect(y0 + y, height) * width + reflect(x0 + x, width));
    for (int channel = 0; channel < 3; channel++)
        put(out + ((size_t)channel * side + y) * side + x,
            __fadd_rn(__fmul_rn((float)pixel[channel], scale[channel]), shift[channel]));
}

// edge.images.normalise(picture.window(y0, x0, y0 + side, x0 + side)): (3, side, side)
extern "C" __global__ void prepare_float(const unsigned char *picture, int height, int width, int y0, int x0, int side,
                                         float scale0, float scale1, float scale2, float shift0, float shift1, float shift2,
                                         float *out) {
    prepare(picture, height, width, y0, x0, side, {scale0, scale1, scale2}, {shift0, shift1, shift2}, out);
}

// the same, .astype(np.float16)
extern "C" __global__ void prepare_half(const unsigned char *picture, int height, int width, int y0, int x0, int side,
                                        float scale0, float scale1, float scale2, float shift0, float shift1, float shift2,
                                        __half *out) {
    prepare(picture, height, width, y0, x0, side, {scale0, scale1, scale2}, {shift0, shift1, shift2}, out);
}

// a pixel as the weighted sum of pixels `step` apart, in whole numbers of 2^-22, as edge.kernels.resample.along
static __device__ void weighted(const unsigned char *in, size_t step, const int *weights, int taps, unsigned char *out) {
    int red = 1 << 21, green = 1 << 21, blue = 1 << 21;
    for (int tap = 0; tap < taps; tap++) {
        int weight = weights[tap];
        if (weight == 0) continue;  // such a tap may lie outside the picture
        const unsigned char *pixel = in + tap * step;
        red += weight * pixel[0];
        green += weight * pixel[1];
        blue += weight * pixel[2];
    }
    out[0] = min(max(red >> 22, 0), 255);
    out[1] = min(max(green >> 22, 0), 255);
    out[2] = min(max(blue >> 22, 0), 255);
}

// resample.along(in, 1, table): (height, in_width, 3) to (height, out_width, 3)
extern "C" __global__ void resample_cols_u8(const unsigned char *__restrict__ in, int height, int in_width, int out_width,
                                            const int *__restrict__ first, const int *__restrict__ weights, int taps,
                                            unsigned char *__restrict__ out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= out_width || y >= height) return;
    weighted(in + 3 * ((size_t)y * in_width + first[x]), 3, weights + (size_t)x * taps, taps,
             out + 3 * ((size_t)y * out_width + x));
}

// resample.along(in, 0, table): (any, width, 3) to (out_height, width, 3)
extern "C" __global__ void resample_rows_u8(const unsigned char *__restrict__ in, int width, int out_height,
                                            const int *__restrict__ first, const int *__restrict__ weights, int taps,
                                            unsigned char *__restrict__ out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= out_height) return;
    weighted(in + 3 * ((size_t)first[y] * width + x), 3 * (size_t)width, weights + (size_t)y * taps, taps,
             out + 3 * ((size_t)y * width + x));
}
