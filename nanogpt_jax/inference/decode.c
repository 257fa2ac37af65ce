/* One more position of B texts through a whole GPT-2, in float32: what gpt2.decode_step computes, as one function that
   XLA calls on a CPU. native.py builds it, says why, and hands it arrays in the order of the two lists below; it gives
   back logits [B, V], and K and V of each layer as they came, with one position more.

   B texts, C channels, H heads, D head dim, S cache length, I inputs and O outputs of a product. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "xla/ffi/api/c_api.h"

enum { X, LENGTH, LN_F, LN_F_BIAS, WTE, LAYERS };
enum {
  K, V, LN_1, LN_1_BIAS, ATTN, ATTN_BIAS, ATTN_PROJ, ATTN_PROJ_BIAS,
  LN_2, LN_2_BIAS, FC, FC_BIAS, MLP_PROJ, MLP_PROJ_BIAS, PER_LAYER
};

typedef struct {
  int64_t B, C, H, D, S, n_layer, n_vocab;
  float **in, *qkv, *heads, *wide, *residual, *own, *logits;
  const int32_t *length; /* [B], positions in the cache before this one */
  unsigned threads;
  atomic_uint arrived; /* how often one of them has come to the end of a part of the step */
} Step;

static void take_part(Step *step, unsigned thread);

/* ---- threads. XLA has some too, but they sleep when a step begins, and wake within a third of a millisecond. ---- */

enum { MOST_THREADS = 64 };
int cores = 1; /* that this process may use; native.py sets it */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* whose step it is: one at a time */
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static _Atomic uint64_t called; /* steps so far, times 256, plus the threads of the last one */
static atomic_uint asleep, returned; /* helpers that sleep; those that are through with their share of this step */
static Step *current;
static struct Helper {
  unsigned thread;
  uint64_t seen; /* of `called` */
} helpers[MOST_THREADS];
static unsigned n_helpers;

static void pause_a_moment(unsigned moment) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
  if (moment % 1024 == 0) sched_yield();
}

static double milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static void *help(void *self) {
  struct Helper *helper = self;
  for (;;) {
    double since = milliseconds();
    for (unsigned i = 1; atomic_load(&called) == helper->seen; i++) {
      pause_a_moment(i);
      if (i % 256 || milliseconds() - since < 1) continue; /* the next token mostly comes sooner than that */
      pthread_mutex_lock(&sleeping);
      atomic_fetch_add(&asleep, 1);
      while (atomic_load(&called) == helper->seen) pthread_cond_wait(&wake, &sleeping);
      atomic_fetch_sub(&asleep, 1);
      pthread_mutex_unlock(&sleeping);
    }
    helper->seen = atomic_load(&called);
    if (helper->thread >= helper->seen % 256) continue; /* no share for it: nobody waits, and the step may be over */
    take_part(current, helper->thread);
    atomic_fetch_add(&returned, 1);
  }
  return NULL;
}

static void find_helpers(unsigned n) {
  for (pthread_t thread; n_helpers < n; n_helpers++) {
    helpers[n_helpers] = (struct Helper){n_helpers + 1, atomic_load(&called)};
    if (pthread_create(&thread, NULL, help, &helpers[n_helpers])) return; /* fewer, then */
    pthread_detach(thread);
  }
}

static void work_together(Step *step) {
  current = step;
  atomic_store(&returned, 0);
  atomic_store(&called, (atomic_load(&called) / 256 + 1) * 256 + step->threads);
  if (atomic_load(&asleep)) {
    pthread_mutex_lock(&sleeping);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleeping);
  }
  take_part(step, 0);
  for (unsigned i = 1; atomic_load(&returned) + 1 < step->threads; i++) pause_a_moment(i);
}

/* The step is cut into parts; all have done theirs of one before anybody begins the next. */
static void wait_for_all(Step *step, unsigned *parts) {
  unsigned all = step->threads * ++*parts;
  atomic_fetch_add(&step->arrived, 1);
  for (unsigned i = 1; atomic_load(&step->arrived) < all; i++) pause_a_moment(i);
}

/* ---- the mathematics ---- */

enum { LANES = 8, ROWS = 4 };
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* The products of ROWS rows of W [O, I], `distance` apart, with one or two texts: x [texts, I] -> y [texts, O]. */
static inline __attribute__((always_inline)) void dots(const float *W, const float *x, float *y, int64_t I, int64_t O,
                                                       int64_t row, int64_t distance, int texts) {
  Lanes sums[2][ROWS] = {{{0}}};
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + LANES <= I; i += LANES)
    for (int r = 0; r < ROWS; r++) {
      Lanes w = *(const Lanes *)(W + (row + r * distance) * I + i);
      for (int b = 0; b < texts; b++) sums[b][r] += w * *(const Lanes *)(x + b * I + i);
    }
  for (int r = 0; r < ROWS; r++)
    for (int b = 0; b < texts; b++) {
      float sum = 0;
      for (int lane = 0; lane < LANES; lane++) sum += sums[b][r][lane];
      for (int64_t j = i; j < I; j++) sum += W[(row + r * distance) * I + j] * x[b * I + j];
      y[b * O + row + r * distance] = sum;
    }
}

/* y [B, O] = x [B, I] Wᵀ, of it the rows first .. last - 1 of W [O, I]. ROWS of them at once, far apart, as memory is read
   faster in a few streams than in one; two texts at once, as each weight is then fetched half as often. */
static void multiply(const float *W, const float *x, float *y, int64_t B, int64_t I, int64_t O, int64_t first,
                     int64_t last) {
  int64_t distance = (last - first) / ROWS;
  for (int64_t row = first; row < first + distance; row++) {
    for (int64_t b = 0; b + 1 < B; b += 2) dots(W, x + b * I, y + b * O, I, O, row, distance, 2);
    if (B % 2) dots(W, x + (B - 1) * I, y + (B - 1) * O, I, O, row, distance, 1);
  }
  for (int64_t row = first + ROWS * distance; row < last; row++)
    for (int64_t b = 0; b < B; b++) {
      float sum = 0;
      for (int64_t i = 0; i < I; i++) sum += W[row * I + i] * x[b * I + i];
      y[b * O + row] = sum;
    }
}

static void layer_norm(const float *x, const float *scale, const float *bias, float *y, int64_t B, int64_t C) {
  for (int64_t b = 0; b < B; b++, x += C, y += C) {
    float sum = 0, squares = 0;
    for (int64_t c = 0; c < C; c++) sum += x[c];
    float mean = sum / C;
    for (int64_t c = 0; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
    float per_std = 1 / sqrtf(squares / C + 1e-5f);
    for (int64_t c = 0; c < C; c++) y[c] = (x[c] - mean) * per_std * scale[c] + bias[c];
  }
}

static float gelu(float x) { return x / (1 + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }

/* softmax(qKᵀ/√D)V of head n of all B·H, once its new key and value are in the cache. `scores` has room for S of them,
   and for q behind. */
static void attend(Step *s, float **layer, int64_t n, float *scores) {
  int64_t C = s->C, D = s->D, b = n / s->H, at = n % s->H * D, t = s->length[b];
  if (t >= s->S) t = s->S - 1; /* a row that has ended may run over */
  float *k = layer[K] + n * s->S * D, *v = layer[V] + n * s->S * D, *q = scores + s->S;
  const float *qkv = s->qkv + b * 3 * C + at, *bias = layer[ATTN_BIAS] + at;
  for (int64_t d = 0; d < D; d++) {
    q[d] = (qkv[d] + bias[d]) / sqrtf(D);
    k[t * D + d] = qkv[C + d] + bias[C + d];
    v[t * D + d] = qkv[2 * C + d] + bias[2 * C + d];
  }
  multiply(k, q, scores, 1, D, s->S, 0, t + 1);
  float top = scores[0], sum = 0, *y = s->heads + b * C + at;
  for (int64_t i = 1; i <= t; i++) top = scores[i] > top ? scores[i] : top;
  for (int64_t i = 0; i <= t; i++) sum += scores[i] = expf(scores[i] - top);
  for (int64_t d = 0; d < D; d++) y[d] = 0;
  int64_t i = 0;
  for (; i + 4 <= t + 1; i += 4)
    for (int64_t d = 0; d < D; d++)
      y[d] += scores[i] * v[i * D + d] + scores[i + 1] * v[(i + 1) * D + d] + scores[i + 2] * v[(i + 2) * D + d] +
              scores[i + 3] * v[(i + 3) * D + d];
  for (; i <= t; i++)
    for (int64_t d = 0; d < D; d++) y[d] += scores[i] * v[i * D + d];
  for (int64_t d = 0; d < D; d++) y[d] /= sum;
}

/* y = x + bias + W in: what a layer has worked out, in [B, I], back into the residual; of it channels first .. last - 1. */
static void add_product(Step *s, const float *W, const float *bias, const float *in, int64_t I, const float *x, float *y,
                        int64_t first, int64_t last) {
  multiply(W, in, y, s->B, I, s->C, first, last);
  for (int64_t b = 0; b < s->B; b++)
    for (int64_t c = first; c < last; c++) y[b * s->C + c] += x[b * s->C + c] + bias[c];
}

/* One thread's share of the step. It is the same share of every weight at each step, 1.07 times as fast as taking
   whatever is left to take. Layer norms are short, so each works them out for itself. */
static void take_part(Step *s, unsigned thread) {
  int64_t B = s->B, C = s->C, from = thread, to = thread + 1, n = s->threads, first = C * from / n, last = C * to / n;
  float *y = s->residual, *normed = s->own + thread * (B * C + s->S + s->D), *scores = normed + B * C;
  const float *x = s->in[X];
  unsigned parts = 0;
  for (int64_t l = 0; l < s->n_layer; l++) {
    float **layer = s->in + LAYERS + l * PER_LAYER;
    layer_norm(x, layer[LN_1], layer[LN_1_BIAS], normed, B, C);
    multiply(layer[ATTN], normed, s->qkv, B, C, 3 * C, 3 * C * from / n, 3 * C * to / n);
    wait_for_all(s, &parts);
    for (int64_t head = B * s->H * from / n; head < B * s->H * to / n; head++) attend(s, layer, head, scores);
    wait_for_all(s, &parts);
    add_product(s, layer[ATTN_PROJ], layer[ATTN_PROJ_BIAS], s->heads, C, x, y, first, last);
    wait_for_all(s, &parts);
    x = y, y += B * C;
    layer_norm(x, layer[LN_2], layer[LN_2_BIAS], normed, B, C);
    multiply(layer[FC], normed, s->wide, B, C, 4 * C, 4 * C * from / n, 4 * C * to / n);
    for (int64_t b = 0; b < B; b++)
      for (int64_t c = 4 * C * from / n; c < 4 * C * to / n; c++)
        s->wide[b * 4 * C + c] = gelu(s->wide[b * 4 * C + c] + layer[FC_BIAS][c]);
    wait_for_all(s, &parts);
    add_product(s, layer[MLP_PROJ], layer[MLP_PROJ_BIAS], s->wide, 4 * C, x, y, first, last);
    wait_for_all(s, &parts);
    x = y, y += B * C;
  }
  layer_norm(x, s->in[LN_F], s->in[LN_F_BIAS], normed, B, C);
  multiply(s->in[WTE], normed, s->logits, B, C, s->n_vocab, s->n_vocab * from / n, s->n_vocab * to / n);
}

/* ---- the call from XLA ---- */

static XLA_FFI_Error *error(const XLA_FFI_Api *api, const char *message, XLA_FFI_Error_Code code) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return api->XLA_FFI_Error_Create(&args);
}

XLA_FFI_Error *decode(XLA_FFI_CallFrame *frame) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Api_Version *version = &((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata->api_version;
    version->major_version = XLA_FFI_API_MAJOR;
    version->minor_version = XLA_FFI_API_MINOR;
    return NULL;
  }
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  int64_t n_arrays = frame->args.size, n_layer = (n_arrays - LAYERS) / PER_LAYER, n_vocab = in[WTE]->dims[0];
  int64_t B = in[X]->dims[0], C = in[X]->dims[1], S = in[LAYERS + K]->dims[1], D = in[LAYERS + K]->dims[2];
  int64_t enough = (12 * n_layer * C + n_vocab) * C / 1000000 + 1; /* a share of a million weights: 0.1 ms */
  unsigned threads = cores;
  if (threads > enough) threads = enough;
  if (threads > MOST_THREADS) threads = MOST_THREADS;

  pthread_mutex_lock(&turn);
  find_helpers(threads - 1);
  if (threads > n_helpers + 1) threads = n_helpers + 1;
  int64_t BC = B * C, own = BC + S + D;
  float *scratch = malloc((BC * (8 + 2 * n_layer) + own * threads) * sizeof *scratch), *arrays[n_arrays];
  if (scratch) {
    for (int64_t i = 0; i < n_arrays; i++) arrays[i] = in[i]->data;
    Step step = {.B = B, .C = C, .H = C / D, .D = D, .S = S, .n_layer = n_layer, .n_vocab = n_vocab,
                 .in = arrays, .length = in[LENGTH]->data, .logits = out[0]->data, .threads = threads,
                 .qkv = scratch, .heads = scratch + 3 * BC, .wide = scratch + 4 * BC, .own = scratch + 8 * BC,
                 .residual = scratch + 8 * BC + own * threads};
    work_together(&step);
    free(scratch);
  }
  pthread_mutex_unlock(&turn);
  return scratch ? NULL : error(frame->api, "no memory for a step", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
}
