// edge/warp/reference.py on a GPU: a picture sampled at a grid, and scores brought back to every pixel of the image.
// One thread per sample or pixel: x, y. Each kernel equals its numpy twin bit for bit; __fmul_rn and __fadd_rn stay two
// roundings, where * and + would become one.
#include <cuda_fp16.h>

static __device__ float minus(float a, float b) { return __fadd_rn(a, -b); }

static __device__ float between(float low, float high, float fraction) {
    return __fadd_rn(low, __fmul_rn(minus(high, low), fraction));
}

static __device__ void corner_weights(float fy, float fx, float *weights) {
    float ey = minus(1, fy), ex = minus(1, fx);
    weights[0] = __fmul_rn(ey, ex);
    weights[1] = __fmul_rn(ey, fx);
    weights[2] = __fmul_rn(fy, ex);
    weights[3] = __fmul_rn(fy, fx);
}

// four values (0, 0), (0, 1), (1, 0), (1, 1) about a point
template <class T> static __device__ float weighted(const T *in, const size_t *at, const float *weights) {
    float sum = __fmul_rn((float)in[at[0]], weights[0]);
    for (int corner = 1; corner < 4; corner++) sum = __fadd_rn(sum, __fmul_rn((float)in[at[corner]], weights[corner]));
    return sum;
}

static __device__ void put(float *at, float value) { *at = value; }
static __device__ void put(__half *at, float value) { *at = __float2half_rn(value); }

// the two pixels about u, clamped at the border, and the way from the first to the second
static __device__ void about(float u, int size, int *low, int *high, float *fraction) {
    float at = fminf(fmaxf(minus(__fmul_rn(u, (float)size), 0.5f), 0), (float)(size - 1));
    *low = (int)at;
    *high = min(*low + 1, size - 1);
    *fraction = minus(at, (float)*low);
}

template <class T>
static __device__ void sample(const unsigned char *__restrict__ picture, int height, int width,
                              const float *__restrict__ grid, int rows, int cols, const float (&scale)[3],
                              const float (&shift)[3], T *__restrict__ out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= cols || y >= rows) return;
    size_t place = (size_t)y * cols + x, plane = (size_t)rows * cols;
    int y0, y1, x0, x1;
    float fy, fx, weights[4];
    about(grid[2 * place], height, &y0, &y1, &fy);
    about(grid[2 * place + 1], width, &x0, &x1, &fx);
    corner_weights(fy, fx, weights);
    size_t top = (size_t)y0 * width, bottom = (size_t)y1 * width;
    size_t at[4] = {3 * (top + x0), 3 * (top + x1), 3 * (bottom + x0), 3 * (bottom + x1)};
    for (int channel = 0; channel < 3; channel++)
        put(out + channel * plane + place,
            __fadd_rn(__fmul_rn(weighted(picture + channel, at, weights), scale[channel]), shift[channel]));
}

// edge.images.normalise(reference.sample(picture, grid)): (height, width, 3), (rows, cols, 2) to (3, rows, cols)
extern "C" __global__ void sample_float(const unsigned char *picture, int height, int width, const float *grid, int rows,
                                        int cols, float scale0, float scale1, float scale2, float shift0, float shift1,
                                        float shift2, float *out) {
    sample(picture, height, width, grid, rows, cols, {scale0, scale1, scale2}, {shift0, shift1, shift2}, out);
}

// the same, .astype(np.float16)
extern "C" __global__ void sample_half(const unsigned char *picture, int height, int width, const float *grid, int rows,
                                       int cols, float scale0, float scale1, float scale2, float shift0, float shift1,
                                       float shift2, __half *out) {
    sample(picture, height, width, grid, rows, cols, {scale0, scale1, scale2}, {shift0, shift1, shift2}, out);
}

// the four scores about pixel (y, x). mesh (2, n, m): reference.inverse, points `step` px apart; its coordinates count the
// padding of the scores, which here is an index that is clamped
static __device__ void locate(const float *__restrict__ mesh, int step, int height, int width, int y, int x, int rows,
                              int cols, size_t *at, float *weights) {
    int i = y / step, j = x / step, n = (height + step - 1) / step + 1, m = (width + step - 1) / step + 1;
    float f = __fadd_rn((float)(y - i * step), 0.5f) / (float)min(step, height - i * step);
    float g = __fadd_rn((float)(x - j * step), 0.5f) / (float)min(step, width - j * step);
    float found[2];
    for (int axis = 0; axis < 2; axis++) {
        const float *top = mesh + ((size_t)axis * n + i) * m + j, *bottom = top + m;
        found[axis] = between(between(top[0], top[1], g), between(bottom[0], bottom[1], g), f);
    }
    int row = (int)found[0], col = (int)found[1];
    corner_weights(minus(found[0], (float)row), minus(found[1], (float)col), weights);
    size_t top = (size_t)max(row - 1, 0) * cols, bottom = (size_t)min(row, rows - 1) * cols;
    int left = max(col - 1, 0), right = min(col, cols - 1);
    at[0] = top + left, at[1] = top + right, at[2] = bottom + left, at[3] = bottom + right;
}

// reference.unwarp: scores (channels, rows, cols) to the image rows y0 .. y0 + count: (channels, count, width)
extern "C" __global__ void unwarp_scores(const float *__restrict__ scores, int channels, int rows, int cols,
                                         const float *__restrict__ mesh, int step, int height, int width, int y0, int count,
                                         float *__restrict__ out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= count) return;
    size_t at[4];
    float weights[4];
    locate(mesh, step, height, width, y0 + y, x, rows, cols, at, weights);
    for (int channel = 0; channel < channels; channel++)
        out[((size_t)channel * count + y) * width + x] = weighted(scores + (size_t)channel * rows * cols, at, weights);
}

// edge.scores.labels_of what unwarp_scores gives: (count, width)
extern "C" __global__ void unwarp_labels(const float *__restrict__ scores, int channels, int rows, int cols,
                                         const float *__restrict__ mesh, int step, int height, int width, int y0, int count,
                                         unsigned char *__restrict__ labels) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= count) return;
    size_t at[4];
    float weights[4];
    locate(mesh, step, height, width, y0 + y, x, rows, cols, at, weights);
    float best = weighted(scores, at, weights);
    int label = channels == 1 && best > 0;
    for (int channel = 1; channel < channels; channel++) {
        float score = weighted(scores + (size_t)channel * rows * cols, at, weights);
        if (score > best) label = channel;
        if (score > best || score != score) best = score;  // nothing is larger than a NaN, which np.maximum keeps
    }
    labels[(size_t)y * width + x] = label;
}
