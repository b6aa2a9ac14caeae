// Forward and backward of one problem on a machine that has no Python: wkv_driver INPUTS OUTPUTS.
//
// INPUTS: int64 version, B, T, H, N, io, constant_decay; then the operator's tensors in its C order, the initial state,
// the gradients of y and of the final state. OUTPUTS: y, final state, the tensors' gradients, the state's.
// Outputs hold NaN beforehand. Prints the library's target.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "wkv.h"

namespace {

using Bytes = std::vector<unsigned char>;

void require(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "wkv_driver: %s\n", what);
    exit(1);
}

Bytes read(FILE *file, size_t bytes) {
    Bytes content(bytes);
    require(fread(content.data(), 1, bytes, file) == bytes, "the inputs end early");
    return content;
}

Bytes poisoned(size_t bytes) {
    return Bytes(bytes, 0xff);  // NaN in every element type
}

}  // namespace

int main(int count, char **arguments) {
    require(count == 3, "usage: wkv_driver INPUTS OUTPUTS");
    FILE *in = fopen(arguments[1], "rb"), *out = fopen(arguments[2], "wb");
    require(in && out, "a file cannot be opened");
    int64_t header[7];
    require(fread(header, sizeof(header), 1, in) == 1, "no header");
    const auto [version, B, T, H, N, io, constant] = header;
    rwkv_problem problem = {B, T, H, N, static_cast<int32_t>(io), RWKV_EXACT, 2, static_cast<int32_t>(constant), nullptr, nullptr};

    const size_t full = B * T * H * N * (io == RWKV_FP32 ? 4 : 2), state = B * H * N * N * 4, row = H * N * 4;
    std::vector<size_t> sizes(version == 7 ? 6 : 5, full), gradient_sizes = sizes;
    if (version == 6) {
        sizes[4] = row, gradient_sizes[4] = B * row;
        if (constant) sizes[3] = row, gradient_sizes[3] = B * row;
    }
    std::vector<Bytes> x, g;
    for (size_t size : sizes) x.push_back(read(in, size));
    const Bytes first = read(in, state), dy = read(in, full), dlast = read(in, state);
    const auto initial = reinterpret_cast<const float *>(first.data());
    const auto dfinal = reinterpret_cast<const float *>(dlast.data());

    const int64_t kept = rwkv_saved_bytes(version, &problem);
    require(kept > 0, "no kernel for this problem");
    Bytes y = poisoned(full), last = poisoned(state), saved = poisoned(kept), dfirst = poisoned(state);
    for (size_t size : gradient_sizes) g.push_back(poisoned(size));
    const auto final_state = reinterpret_cast<float *>(last.data()), dinitial = reinterpret_cast<float *>(dfirst.data());
    int32_t status;
    if (version == 7) {
        status = rwkv_wkv7_forward(&problem, x[0].data(), x[1].data(), x[2].data(), x[3].data(), x[4].data(),
                                   x[5].data(), initial, y.data(), final_state, saved.data());
        require(status == RWKV_OK, rwkv_status_text(status));
        status = rwkv_wkv7_backward(&problem, x[0].data(), x[1].data(), x[2].data(), x[3].data(), x[4].data(),
                                    x[5].data(), saved.data(), dy.data(), dfinal, g[0].data(), g[1].data(),
                                    g[2].data(), g[3].data(), g[4].data(), g[5].data(), dinitial);
    } else {
        const auto u = reinterpret_cast<const float *>(x[4].data());
        status = rwkv_wkv6_forward(&problem, x[0].data(), x[1].data(), x[2].data(), x[3].data(), u, initial, y.data(),
                                   final_state, saved.data());
        require(status == RWKV_OK, rwkv_status_text(status));
        status = rwkv_wkv6_backward(&problem, x[0].data(), x[1].data(), x[2].data(), x[3].data(), u, saved.data(),
                                    dy.data(), dfinal, g[0].data(), g[1].data(), g[2].data(), g[3].data(),
                                    reinterpret_cast<float *>(g[4].data()), dinitial);
    }
    require(status == RWKV_OK, rwkv_status_text(status));

    std::vector<Bytes> results = {y, last};
    results.insert(results.end(), g.begin(), g.end());
    results.push_back(dfirst);
    for (const Bytes &result : results) {
        require(fwrite(result.data(), 1, result.size(), out) == result.size(), "the outputs cannot be written");
    }
    require(fclose(out) == 0, "the outputs cannot be written");
    puts(rwkv_kernels_target());
    return 0;
}
