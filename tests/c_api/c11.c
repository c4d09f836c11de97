/* keyfold.h as a C11 compiler sees it: the numbers of the codes, and one whole call. */
#include "keyfold/keyfold.h"

_Static_assert(KEYFOLD_OK == 0 && KEYFOLD_INVALID_ARGUMENT == 1 && KEYFOLD_UNSUPPORTED == 2 &&
                   KEYFOLD_CANCELLED == 3 && KEYFOLD_OUT_OF_MEMORY == 4 &&
                   KEYFOLD_DEVICE_FAILURE == 5 && KEYFOLD_INTERNAL == 6,
               "status codes are part of the ABI");

/* One key: the output is its value. Returns the status, or -1 if the output is wrong. */
int attend_to_one_key(void) {
  float q[2] = {1, 2}, k[2] = {3, 4}, v[2] = {5, 6}, out[2] = {0, 0};
  int64_t shape[4] = {1, 1, 1, 2};
  DLTensor q_tensor = {.data = q, .device = {kDLCPU, 0}, .ndim = 4, .shape = shape};
  q_tensor.dtype = (DLDataType){.code = kDLFloat, .bits = 32, .lanes = 1};
  DLTensor k_tensor = q_tensor, v_tensor = q_tensor, out_tensor = q_tensor;
  k_tensor.data = k;
  v_tensor.data = v;
  out_tensor.data = out;

  keyfold_options* options = NULL;
  keyfold_status status = keyfold_options_create(&options);
  if (status == KEYFOLD_OK) status = keyfold_options_set_causal(options, true);
  if (status == KEYFOLD_OK) {
    status =
        keyfold_scaled_dot_product_attention(&q_tensor, &k_tensor, &v_tensor, &out_tensor, options);
  }
  keyfold_options_destroy(options);
  if (status != KEYFOLD_OK) return (int)status;
  return out[0] == 5 && out[1] == 6 ? KEYFOLD_OK : -1;
}
