// The C interface of the loss over a chunk of logits. CUDA library only.
#pragma once
#include <stdint.h>

#define RWKV_MOST_LOGITS (1 << 30)

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int64_t rows, vocabulary, stride;  // m, may be 0; V, 1 to RWKV_MOST_LOGITS; elements from a row to the next, >= V
    int32_t io;  // of the logits: RWKV_FP32, RWKV_BF16, RWKV_FP16. Arithmetic is fp32
    int32_t gradient;  // 1: the logits are replaced by their gradient. 0: they stay
    float l2wrap;
    void *stream;  // cudaStream_t on the current device
} rwkv_logits;

// losses[i] = log(sum of exp(logits[i])) - logits[i][targets[i]], fp32 [m]; targets int64 [m].
// Gradient of their sum: softmax(logits[i]), less 1 at the target, plus l2wrap times the largest logit where that is,
// the first in a tie. A row with a NaN, or whose target is not in 0 .. V - 1, has NaN for loss and gradient.
// Rows may begin at any address that is a multiple of the element's size; what lies between them stays.
int32_t rwkv_softmax_loss(const rwkv_logits *shape, void *logits, const int64_t *targets, float *losses);

#ifdef __cplusplus
}
#endif
