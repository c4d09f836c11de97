/* Attention from C: random tensors, a causal call of 16 queries over 1000 keys with grouped heads,
 * and a check of every output against the plain formula in double. Exit code 0 if they agree. */
#include <keyfold/keyfold.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 8, KV_HEADS = 2, Q_LEN = 16, KV_LEN = 1000, DIM = 64 };

static float q[HEADS][Q_LEN][DIM], out[HEADS][Q_LEN][DIM], lse[HEADS][Q_LEN];
static float k[KV_HEADS][KV_LEN][DIM], v[KV_HEADS][KV_LEN][DIM];

static void fill(float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) values[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
}

/* A float32 tensor in compact row-major order; it owns nothing. */
static DLTensor tensor(void* data, int ndim, int64_t* shape) {
  DLTensor t = {.data = data, .device = {kDLCPU, 0}, .ndim = ndim, .shape = shape};
  t.dtype = (DLDataType){.code = kDLFloat, .bits = 32, .lanes = 1};
  return t;
}

static int fail(const char* what, keyfold_status status) {
  fprintf(stderr, "%s: %s: %s\n", what, keyfold_status_name(status), keyfold_last_error());
  return EXIT_FAILURE;
}

/* Largest difference between out, lse and the formula. */
static double largest_error(void) {
  static double weight[KV_LEN];
  double largest = 0;
  for (int h = 0; h < HEADS; ++h) {
    const int kv_head = h / (HEADS / KV_HEADS);
    for (int i = 0; i < Q_LEN; ++i) {
      const int visible = KV_LEN - Q_LEN + i + 1; /* bottom-right: the last query sees all keys */
      double sum = 0;
      for (int j = 0; j < visible; ++j) {
        double score = 0;
        for (int d = 0; d < DIM; ++d) score += (double)q[h][i][d] * k[kv_head][j][d];
        weight[j] = exp(score / sqrt(DIM));
        sum += weight[j];
      }
      largest = fmax(largest, fabs(lse[h][i] - log(sum)));
      for (int d = 0; d < DIM; ++d) {
        double expected = 0;
        for (int j = 0; j < visible; ++j) expected += weight[j] / sum * v[kv_head][j][d];
        largest = fmax(largest, fabs(out[h][i][d] - expected));
      }
    }
  }
  return largest;
}

int main(void) {
  fill(&q[0][0][0], sizeof q / sizeof(float));
  fill(&k[0][0][0], sizeof k / sizeof(float));
  fill(&v[0][0][0], sizeof v / sizeof(float));

  int64_t q_shape[] = {1, HEADS, Q_LEN, DIM}, kv_shape[] = {1, KV_HEADS, KV_LEN, DIM};
  const DLTensor q_tensor = tensor(q, 4, q_shape), out_tensor = tensor(out, 4, q_shape);
  const DLTensor k_tensor = tensor(k, 4, kv_shape), v_tensor = tensor(v, 4, kv_shape);
  const DLTensor lse_tensor = tensor(lse, 3, q_shape);

  keyfold_options* options = NULL;
  keyfold_status status = keyfold_options_create(&options);
  if (status != KEYFOLD_OK) return fail("options", status);
  keyfold_options_set_causal(options, true);
  keyfold_options_set_lse(options, &lse_tensor);
  keyfold_options_set_budget_ms(options, 8); /* dispatches aim to stay below 8 ms */
  status =
      keyfold_scaled_dot_product_attention(&q_tensor, &k_tensor, &v_tensor, &out_tensor, options);
  keyfold_options_destroy(options);
  if (status != KEYFOLD_OK) return fail("attention", status);

  const keyfold_report* report = keyfold_last_report();
  const double error = largest_error();
  printf("keyfold %s, %s (%s): %lld dispatches, %.2f ms, largest error %.2g\n", keyfold_version(),
         report->backend, report->kernel, (long long)report->dispatches, report->elapsed_ms, error);
  return error < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
