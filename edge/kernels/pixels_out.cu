// From a net's scores on the device to class ids and overlays. One thread per pixel of the result: x, y.
// Each kernel equals its numpy twin bit for bit; __fmul_rn and __fadd_rn stay two roundings, where * and + would become one.
// A canvas is (channels, canvas_rows, width) scores of which row y of the image is row y % canvas_rows: it may hold
// the whole image, or only the rows that tiles still add to.

// edge.tiles.stitch, one tile: scores (channels, side, side) times rows (side) times cols (side), added at (y0, x0)
extern "C" __global__ void add_tile(const float *__restrict__ scores, int channels, int side, const float *__restrict__ rows,
                                    const float *__restrict__ cols, float *__restrict__ canvas, int canvas_rows, int height,
                                    int width, int y0, int x0) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= side || y >= side || x0 + x >= width || y0 + y >= height) return;
    float weight = __fmul_rn(rows[y], cols[x]);
    size_t from = (size_t)y * side + x, to = (size_t)((y0 + y) % canvas_rows) * width + x0 + x;
    for (int channel = 0; channel < channels; channel++) {
        canvas[to] = __fadd_rn(canvas[to], __fmul_rn(scores[from], weight));
        from += (size_t)side * side;
        to += (size_t)canvas_rows * width;
    }
}

// edge.scores.labels_of on the image rows y0 .. y0 + count: (count, width); clear: what was read becomes 0
extern "C" __global__ void decode(float *__restrict__ canvas, int channels, int canvas_rows, int width, int y0, int count,
                                  int clear, unsigned char *__restrict__ labels) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= count) return;
    size_t at = (size_t)((y0 + y) % canvas_rows) * width + x, plane = (size_t)canvas_rows * width;
    float best = canvas[at];
    int label = channels == 1 && best > 0;
    for (int channel = 1; channel < channels; channel++) {
        float score = canvas[at + channel * plane];
        if (score > best) label = channel;
        if (score > best || score != score) best = score;  // nothing is larger than a NaN, which np.maximum keeps
    }
    labels[(size_t)y * width + x] = label;
    for (int channel = 0; clear && channel < channels; channel++) canvas[at + channel * plane] = 0;
}

// the weighted sum of scores `step` apart, as edge.kernels.resample.along
static __device__ float weighted(const float *in, size_t step, const double *weights, int taps) {
    double sum = 0;
    for (int tap = 0; tap < taps; tap++)  // a tap of weight 0 may lie outside
        if (weights[tap] != 0) sum = __dadd_rn(sum, __dmul_rn((double)in[tap * step], weights[tap]));
    return (float)sum;
}

// resample.along(in, 1, table): (planes_rows, in_width) to (planes_rows, out_width)
extern "C" __global__ void resample_cols_float(const float *__restrict__ in, int planes_rows, int in_width, int out_width,
                                               const int *__restrict__ first, const double *__restrict__ weights, int taps,
                                               float *__restrict__ out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= out_width || y >= planes_rows) return;
    out[(size_t)y * out_width + x] = weighted(in + (size_t)y * in_width + first[x], 1, weights + (size_t)x * taps, taps);
}

// resample.along(in, 1, table)[:, y0:y0 + count]: (channels, in_rows, width) to (channels, count, width)
extern "C" __global__ void resample_rows_float(const float *__restrict__ in, int in_rows, int channels, int width, int y0,
                                               int count, const int *__restrict__ first, const double *__restrict__ weights,
                                               int taps, float *__restrict__ out) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= count) return;
    for (int channel = 0; channel < channels; channel++) {
        size_t from = ((size_t)channel * in_rows + first[y0 + y]) * width + x;
        out[((size_t)channel * count + y) * width + x] = weighted(in + from, width, weights + (size_t)(y0 + y) * taps, taps);
    }
}

// edge.images.blend on count pixels: picture (count, 3), labels (count), palette (256, 3)
extern "C" __global__ void blend(const unsigned char *__restrict__ picture, const unsigned char *__restrict__ labels,
                                 const unsigned char *__restrict__ palette, float opacity, int count,
                                 unsigned char *__restrict__ out) {
    size_t row = (size_t)gridDim.x * blockDim.x;  // a launch may have rows of threads, as for the others: none works twice
    size_t at = (blockIdx.y * blockDim.y + threadIdx.y) * row + blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (size_t)count) return;
    for (int channel = 0; channel < 3; channel++) {
        unsigned char under = picture[3 * at + channel];
        float step = (float)(palette[3 * labels[at] + channel] - under);
        out[3 * at + channel] = labels[at] ? (unsigned char)__fadd_rn((float)under, __fmul_rn(step, opacity)) : under;
    }
}
