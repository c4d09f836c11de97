/* The C API of keyfold, for C11 and for every language that calls C: opaque handles, status codes,
 * DLPack tensors. What is computed is described in full in keyfold/attention.hpp. */
#ifndef KEYFOLD_KEYFOLD_H
#define KEYFOLD_KEYFOLD_H

#include <dlpack/dlpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "keyfold/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Rules that hold for every function --------------------------------------------------------
 *
 * Status: functions that can fail return a keyfold_status; keyfold_last_error() then has the
 * message, which names the argument, what was expected and what came. No C++ exception leaves the
 * library, and it never prints or aborts. On an error, nothing that the caller passed was written.
 *
 * NULL: a NULL argument is KEYFOLD_INVALID_ARGUMENT unless its comment allows it. NULL options are
 * the defaults. Every *_destroy function accepts NULL.
 *
 * Tensors: a DLTensor is borrowed, and only its memory must outlive the call: the struct, its shape
 * and its strides are copied. Memory that an options handle names (mask, sinks, lse) must live
 * while calls use that handle; what a state borrows, until it is destroyed. Accepted are: device
 * kDLCPU (and kDLCUDAHost); where a function says so, kDLCUDA (and kDLCUDAManaged); lanes 1;
 * kDLFloat with 32 or 16 bits, kDLBfloat with 16, and for masks KEYFOLD_DL_BOOL or kDLUInt with 8
 * (one byte, 0 = hidden); four axes [batch, heads, len, dim] in any memory order by strides.
 * strides == NULL means compact and row-major, as in DLPack; strides count elements, 0 broadcasts,
 * negative ones are refused. byte_offset is added to data; the sum must be aligned to the element.
 * An lse may also have three axes [batch, num_heads, q_len], sinks one [num_heads].
 *
 * Threads: functions may be called from any thread at any time. One state or options handle is used
 * by one thread at a time, except that several calls may read the same options handle together.
 *
 * Structs that keyfold hands out grow at their end only, so a program built against an older header
 * keeps working. */

/** The code of kDLBool, which DLPack has had since 0.8. */
#define KEYFOLD_DL_BOOL 6

/** What became of a call; the error numbers are those of keyfold::ErrorCode. */
typedef enum keyfold_status {
  KEYFOLD_OK = 0,               /**< done */
  KEYFOLD_INVALID_ARGUMENT = 1, /**< an argument, option or environment value is wrong */
  KEYFOLD_UNSUPPORTED = 2,    /**< no backend here can do this; the message says what would work */
  KEYFOLD_CANCELLED = 3,      /**< a callback or a cancel token ended the call; out is untouched */
  KEYFOLD_OUT_OF_MEMORY = 4,  /**< host or device memory ran out */
  KEYFOLD_DEVICE_FAILURE = 5, /**< the device failed while it ran a dispatch */
  KEYFOLD_INTERNAL = 6        /**< a defect in keyfold */
} keyfold_status;

/** Version of the library that is loaded, "major.minor.patch". */
KEYFOLD_API const char* keyfold_version(void);

/** "ok", "invalid argument", ...; "unknown status" for a number that is none. */
KEYFOLD_API const char* keyfold_status_name(keyfold_status status);

/** Message of the last call on this thread that failed, "" before any has; for KEYFOLD_CANCELLED it
 * says where the call stopped. Valid until the next failure on this thread. */
KEYFOLD_API const char* keyfold_last_error(void);

/* ---- Cancelling --------------------------------------------------------------------------------
 */

/** Asks calls to stop, from another thread. */
typedef struct keyfold_cancel_token keyfold_cancel_token;

/** Makes a token that has not been requested. */
KEYFOLD_API keyfold_status keyfold_cancel_token_create(keyfold_cancel_token** token);

/** Ends every call that was given this token with KEYFOLD_CANCELLED at its next chunk boundary, and
 * later ones at once. Returns without waiting. May be called from any thread, and again; not from a
 * signal handler. */
KEYFOLD_API keyfold_status keyfold_cancel_token_request(keyfold_cancel_token* token);

/** Frees the token; calls and options that were given it may live on. */
KEYFOLD_API void keyfold_cancel_token_destroy(keyfold_cancel_token* token);

/** How far a call has come. */
typedef struct keyfold_progress {
  int64_t dispatches;         /**< dispatches finished so far */
  double fraction;            /**< share of the visible query-key pairs done, 0 to 1 */
  double elapsed_ms;          /**< wall time since the call began */
  double last_dispatch_ms;    /**< device time of the last dispatch */
  double longest_dispatch_ms; /**< longest device time of a dispatch so far */
  int64_t next_row;           /**< query rows below this one are finished */
  int64_t next_key;           /**< keys below this one are folded into the rows in flight */
} keyfold_progress;

/** Called on the calling thread after each dispatch; `progress` is valid during the callback.
 * Anything but 0 ends the call with KEYFOLD_CANCELLED. */
typedef int (*keyfold_progress_callback)(const keyfold_progress* progress, void* user);

/* ---- Options -----------------------------------------------------------------------------------
 */

/** What to compute and how to run it. Values are checked by the call that uses them, tensors
 * already by their setter. */
typedef struct keyfold_options keyfold_options;

/** Makes options with every field unset. */
KEYFOLD_API keyfold_status keyfold_options_create(keyfold_options** options);

/** Frees the options; states that were made with them may live on. */
KEYFOLD_API void keyfold_options_destroy(keyfold_options* options);

/** Factor on q.k; finite. Unset: 1/sqrt(head_dim). */
KEYFOLD_API keyfold_status keyfold_options_set_scale(keyfold_options* options, float scale);

/** Whether query i sees key j only if j <= its position (see q_offset). Unset: false. */
KEYFOLD_API keyfold_status keyfold_options_set_causal(keyfold_options* options, bool causal);

/** Position of query row 0 among the keys; row i stands at q_offset + i. May be negative. Unset:
 * kv_len - q_len (with kv_lens: kv_lens[b] - q_len), which is bottom-right alignment. */
KEYFOLD_API keyfold_status keyfold_options_set_q_offset(keyfold_options* options, int64_t q_offset);

/** A side of a window without a bound. */
#define KEYFOLD_UNBOUNDED (-1)

/** Keys that a query at position p sees: p - left <= j <= p + right; each >= 0, or
 * KEYFOLD_UNBOUNDED. Unset: both unbounded. */
KEYFOLD_API keyfold_status keyfold_options_set_window(keyfold_options* options, int64_t left,
                                                      int64_t right);

/** Scores become softcap * tanh(score / softcap), before masks; finite, > 0. Unset: no cap. */
KEYFOLD_API keyfold_status keyfold_options_set_softcap(keyfold_options* options, float softcap);

/** [batch, num_heads, q_len, kv_len]; a size of 1 broadcasts. Boolean: true = visible. float32 or
 * the inputs' dtype: added to the scaled score; -inf hides the key. NULL removes it. */
KEYFOLD_API keyfold_status keyfold_options_set_mask(keyfold_options* options, const DLTensor* mask);

/** [1, num_heads, 1, 1] or [num_heads], float32 or the inputs' dtype: a logit per head that joins
 * the denominator only. NULL removes it. */
KEYFOLD_API keyfold_status keyfold_options_set_sinks(keyfold_options* options,
                                                     const DLTensor* sinks);

/** Keys of each batch entry, 0 to kv_len; keys behind are never read. The numbers are copied. NULL
 * with a count of 0 removes them: kv_len for all. */
KEYFOLD_API keyfold_status keyfold_options_set_kv_lens(keyfold_options* options,
                                                       const int64_t* kv_lens, size_t count);

/** For tensors on a CUDA device, instead of kv_lens: `batch` lengths on that device, borrowed, and
 * read in the order of the stream; taken as 0 below 0 and as kv_len above it. NULL removes it. */
KEYFOLD_API keyfold_status keyfold_options_set_device_kv_lens(keyfold_options* options,
                                                              const int32_t* kv_lens);

/** [batch, num_heads, q_len, 1] or [batch, num_heads, q_len], float32: receives the natural-log
 * logsumexp, sinks included. Not used by a state. NULL removes it. */
KEYFOLD_API keyfold_status keyfold_options_set_lse(keyfold_options* options, const DLTensor* lse);

/** Backend name, as keyfold_device_list_create() lists it. Unset: KEYFOLD_BACKEND, else the first
 * that can. None of this option and of those below changes a bit of the result. */
KEYFOLD_API keyfold_status keyfold_options_set_backend(keyfold_options* options,
                                                       const char* backend);

/** Longest device time of one dispatch in milliseconds, 0.1 to 60000. Unset: KEYFOLD_BUDGET_MS,
 * else 100. */
KEYFOLD_API keyfold_status keyfold_options_set_budget_ms(keyfold_options* options,
                                                         double budget_ms);

/** Keys per dispatch, >= 1, rounded up to whole splits. Unset: KEYFOLD_CHUNK_SIZE, else chosen from
 * measured device time. */
KEYFOLD_API keyfold_status keyfold_options_set_chunk_size(keyfold_options* options,
                                                          int64_t chunk_size);

/** With fewer keys than this, >= 0, one dispatch per row block is made and the budget is not
 * applied. Unset: KEYFOLD_CHUNK_THRESHOLD, else 0. */
KEYFOLD_API keyfold_status keyfold_options_set_chunk_threshold(keyfold_options* options,
                                                               int64_t chunk_threshold);

/** Most scratch bytes for the state of the rows in flight and for packed keys. Unset:
 * KEYFOLD_MAX_SCRATCH_MB, else 256 MiB. */
KEYFOLD_API keyfold_status keyfold_options_set_max_scratch_bytes(keyfold_options* options,
                                                                 int64_t max_scratch_bytes);

/** CPU threads, 1 to 4096; of more than the process may use only those. Unset:
 * KEYFOLD_NUM_THREADS, else all that it may use. */
KEYFOLD_API keyfold_status keyfold_options_set_num_threads(keyfold_options* options,
                                                           int num_threads);

/** For tensors on a CUDA device: the stream (a CUstream or cudaStream_t of the device's primary
 * context) in whose order the call works. Unset, or NULL: the device's default stream. */
KEYFOLD_API keyfold_status keyfold_options_set_stream(keyfold_options* options, void* stream);

/** Called after each dispatch with `user`, which keyfold only passes on. NULL removes it. */
KEYFOLD_API keyfold_status keyfold_options_set_progress(keyfold_options* options,
                                                        keyfold_progress_callback callback,
                                                        void* user);

/** Ends calls when the token is requested. NULL removes it. */
KEYFOLD_API keyfold_status keyfold_options_set_cancel_token(keyfold_options* options,
                                                            const keyfold_cancel_token* token);

/* ---- Attention ---------------------------------------------------------------------------------
 */

/** Exact scaled-dot-product attention over keys of any length.
 *
 *   score[i,j] = cap(scale * sum_d q[i,d] k[j,d]) + mask[i,j]
 *   out[i,:]   = sum_j exp(score[i,j] - lse[i]) v[j,:]
 *   lse[i]     = log(sum_j exp(score[i,j]) + exp(sink))          (natural logarithm)
 *
 * q [batch, num_heads, q_len, head_dim]; k [batch, num_kv_heads, kv_len, head_dim];
 * v [batch, num_kv_heads, kv_len, value_dim]; out [batch, num_heads, q_len, value_dim]; one dtype,
 * float32, float16 or bfloat16. num_heads is a multiple of num_kv_heads. head_dim and value_dim are
 * 1 to 576; kv_len may be 0.
 *
 * Causal attention and windows are aligned bottom-right. A row that sees no key gives 0 and lse
 * -inf (with a sink: 0 and the sink). Hidden keys never influence the result, whatever they hold.
 * Accumulates in float32; the bits depend on no option that says how to run the call.
 *
 * Scratch does not grow with kv_len; see keyfold_plan_create(). Time is about
 * 2 * (head_dim + value_dim) flops per visible pair of a query row and a key.
 *
 * All tensors (q, k, v, out, mask, sinks, lse) may be on one CUDA device (kDLCUDA). No byte of them
 * passes through the host then, and the call works in the order of its stream
 * (keyfold_options_set_stream()): it waits for what is queued there, and what is queued there later
 * finds the result. It returns when all dispatches but the last are done, so a call of one dispatch
 * waits for nothing; its time and what fails in it are not in the report. While the stream is being
 * captured into a CUDA graph nothing is waited for, and times are estimates.
 *
 * Every error leaves out and lse untouched; on a CUDA device they may hold anything then. */
KEYFOLD_API keyfold_status keyfold_scaled_dot_product_attention(const DLTensor* q,
                                                                const DLTensor* k,
                                                                const DLTensor* v,
                                                                const DLTensor* out,
                                                                const keyfold_options* options);

/** How a call ran. */
typedef struct keyfold_report {
  const char* backend;        /**< backend that ran it */
  const char* kernel;         /**< its kernel */
  int64_t dispatches;         /**< dispatches made */
  double longest_dispatch_ms; /**< longest device time of one dispatch */
  double elapsed_ms;          /**< wall time of the call */
  int64_t scratch_bytes;      /**< scratch that was allocated */
  int64_t staging_bytes;      /**< copy of out and lse, when the rows came in several blocks */
  int64_t recoveries;         /**< times that the device was lost and replaced */
} keyfold_report;

/** Report of the last keyfold_scaled_dot_product_attention() or keyfold_state_finish() on this
 * thread that succeeded; NULL before any has. Valid until the next one on this thread. */
KEYFOLD_API const keyfold_report* keyfold_last_report(void);

/** Merges two finished results over disjoint keys into the first:
 *
 *   lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
 *
 * out_a, out_b [batch, num_heads, q_len, value_dim], one dtype; lse_a, lse_b [batch, num_heads,
 * q_len, 1] or [batch, num_heads, q_len], float32, natural logarithm. Results with sinks must carry
 * them in one of the two only. Where both lse are -inf the output is 0. Computes in float32 and
 * rounds once to the dtype; a keyfold_state keeps float32 in between. Allocates nothing. An error
 * leaves out_a and lse_a untouched. */
KEYFOLD_API keyfold_status keyfold_merge_state(const DLTensor* out_a, const DLTensor* lse_a,
                                               const DLTensor* out_b, const DLTensor* lse_b);

/* ---- Keys that arrive piece by piece -----------------------------------------------------------
 */

/** The running state (m, l, o) of attention for a fixed q. Feeding the keys of one call in any
 * number of pieces, cut anywhere, gives the same bits as that call. */
typedef struct keyfold_state keyfold_state;

/** Begins for q [batch, num_heads, q_len, head_dim]. The options are copied; the memory of q, of
 * the mask and of the sinks is borrowed until the state is destroyed, as is the progress callback's
 * user pointer. Where the formula needs the position of the queries (causal, window), q_offset must
 * be set; a mask's key axis is the absolute key position. first_key is the absolute position of the
 * first key that will be fed, a multiple of the plan's split_len. */
KEYFOLD_API keyfold_status keyfold_state_create(const DLTensor* q, const keyfold_options* options,
                                                int64_t first_key, keyfold_state** state);

/** Folds the next keys: k [batch, num_kv_heads, n, head_dim], v [batch, num_kv_heads, n,
 * value_dim], n >= 0, borrowed for the call. The first update allocates float32 state for all rows,
 * which must fit in max_scratch_bytes. KEYFOLD_INVALID_ARGUMENT leaves the state unchanged; after
 * any other error it can only be destroyed. */
KEYFOLD_API keyfold_status keyfold_state_update(keyfold_state* state, const DLTensor* k,
                                                const DLTensor* v);

/** Goes on at another key, so that those between are not seen, as if a mask hid them: `key` is a
 * multiple of the plan's split_len and at least keyfold_state_next_key().
 * KEYFOLD_INVALID_ARGUMENT leaves the state unchanged. */
KEYFOLD_API keyfold_status keyfold_state_skip_to(keyfold_state* state, int64_t key);

/** Adds the keys that `other` has seen, which is left empty and still has to be destroyed. Both
 * must have the same q and formula, and disjoint keys. Exact up to float32 rounding. */
KEYFOLD_API keyfold_status keyfold_state_merge(keyfold_state* state, keyfold_state* other);

/** Writes out [batch, num_heads, q_len, value_dim] and, unless it is NULL, lse [batch, num_heads,
 * q_len, 1] or [batch, num_heads, q_len], and leaves the state empty. KEYFOLD_INVALID_ARGUMENT
 * leaves the state unchanged. */
KEYFOLD_API keyfold_status keyfold_state_finish(keyfold_state* state, const DLTensor* out,
                                                const DLTensor* lse);

/** Copies the numbers of the state, float32: m, the largest score seen (-inf: none was), and l, the
 * sum of exp(score - m) without sinks, [batch, num_heads, q_len, 1] or [batch, num_heads, q_len],
 * and o, the sum of exp(score - m) v, [batch, num_heads, q_len, value_dim]. Two of them over
 * disjoint keys merge by
 *
 *   m = max(m_a, m_b);  l = exp(m_a - m) l_a + exp(m_b - m) l_b;  o likewise
 *
 * The ragged end of what was fed is folded for it: keys can be fed after that only from the begin
 * of a split on (see keyfold_state_skip_to()). KEYFOLD_INVALID_ARGUMENT writes nothing. */
KEYFOLD_API keyfold_status keyfold_state_save(keyfold_state* state, const DLTensor* m,
                                              const DLTensor* l, const DLTensor* o);

/** Takes these numbers for the keys seen so far, which are forgotten: what keyfold_state_save()
 * gave, or what several of these merge to, of the same q and formula. num_kv_heads is that of the
 * keys. The next key stays. With what the same kernel saved, the bits are as if this state had seen
 * the keys. KEYFOLD_INVALID_ARGUMENT leaves the state unchanged. */
KEYFOLD_API keyfold_status keyfold_state_load(keyfold_state* state, const DLTensor* m,
                                              const DLTensor* l, const DLTensor* o,
                                              int64_t num_kv_heads);

/** Absolute position of the next key: first_key plus the keys fed and skipped so far. */
KEYFOLD_API keyfold_status keyfold_state_next_key(const keyfold_state* state, int64_t* next_key);

/** Frees the state. */
KEYFOLD_API void keyfold_state_destroy(keyfold_state* state);

/* ---- Memory on a device ------------------------------------------------------------------------
 */

/** Memory of a backend's device, for keys and values that many calls use. Its address is one that
 * the host can name but not touch. */
typedef struct keyfold_device_buffer keyfold_device_buffer;

/** Allocates `bytes` > 0 on the device of a backend, as keyfold_device_list_create() lists it;
 * KEYFOLD_UNSUPPORTED where that has no memory of its own (the CPU). */
KEYFOLD_API keyfold_status keyfold_device_buffer_create(const char* backend, int64_t bytes,
                                                        keyfold_device_buffer** buffer);

/** The buffer's address. It is for DLTensor.data (device kDLCPU, byte_offset as ever) of k and v,
 * both or neither, on one backend, which is then the default for the call; each tensor must lie
 * inside its buffer. All other tensors are in host memory. */
KEYFOLD_API keyfold_status keyfold_device_buffer_data(const keyfold_device_buffer* buffer,
                                                      void** data);

/** Copies `bytes` from host memory to `offset` of the buffer; returns when that is done. Not while
 * a call uses the buffer. */
KEYFOLD_API keyfold_status keyfold_device_buffer_upload(keyfold_device_buffer* buffer,
                                                        int64_t offset, const void* from,
                                                        int64_t bytes);

/** Copies `bytes` from `offset` of the buffer to host memory; returns when that is done. */
KEYFOLD_API keyfold_status keyfold_device_buffer_download(const keyfold_device_buffer* buffer,
                                                          int64_t offset, void* to, int64_t bytes);

/** Frees the buffer, which no call may be using. */
KEYFOLD_API void keyfold_device_buffer_destroy(keyfold_device_buffer* buffer);

/* ---- What a call will do, and where ------------------------------------------------------------
 */

/** The shape of a call, without its data. */
typedef struct keyfold_shape {
  size_t struct_size;   /**< sizeof(keyfold_shape) */
  int64_t batch;        /**< >= 1 */
  int64_t num_heads;    /**< query heads, a multiple of num_kv_heads */
  int64_t num_kv_heads; /**< key and value heads, >= 1 */
  int64_t q_len;        /**< query rows, >= 1 */
  int64_t kv_len;       /**< keys, >= 0 */
  int64_t head_dim;     /**< of q and k */
  int64_t value_dim;    /**< of v and out */
  DLDataType dtype;     /**< of q, k, v and out */
} keyfold_shape;

/** One dispatch: groups x query rows x keys, each from begin up to and without end. A group is one
 * key/value head of one batch entry: batch_index * num_kv_heads + kv_head. */
typedef struct keyfold_chunk {
  int64_t group_begin, group_end;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
} keyfold_chunk;

/** What a call will do. */
typedef struct keyfold_plan {
  const char* backend;         /**< name of the backend */
  const char* kernel;          /**< its kernel (instruction set, GPU architecture) */
  int64_t split_len;           /**< keys per split; chunk boundaries are multiples of it */
  bool paced;                  /**< chunk sizes follow the clock; `chunks` is then an estimate */
  double budget_ms;            /**< longest device time of one dispatch */
  int64_t keys_per_chunk;      /**< most keys in one chunk */
  int64_t rows_per_chunk;      /**< most query rows in one chunk */
  int64_t rows_per_block;      /**< query rows whose state is in scratch together */
  int64_t num_row_blocks;      /**< blocks of groups and rows, one after another */
  int64_t scratch_bytes;       /**< state and packed keys; does not depend on kv_len */
  int64_t staging_bytes;       /**< copy of out and lse until the call is complete, or 0 */
  size_t num_chunks;           /**< number of chunks */
  const keyfold_chunk* chunks; /**< in the order of their dispatch */
} keyfold_plan;

/** The plan of a call of this shape with these options; fails as that call would for the shape and
 * the options. The plan is freed by keyfold_plan_destroy(). */
KEYFOLD_API keyfold_status keyfold_plan_create(const keyfold_shape* shape,
                                               const keyfold_options* options,
                                               const keyfold_plan** plan);

/** Frees the plan. */
KEYFOLD_API void keyfold_plan_destroy(const keyfold_plan* plan);

/** One device of one backend. */
typedef struct keyfold_device {
  const char* backend;        /**< name for keyfold_options_set_backend() */
  const char* name;           /**< the device's own name */
  const char* kernel;         /**< kernel in use (instruction set, GPU architecture) */
  size_t num_kernels;         /**< number of kernels */
  const char* const* kernels; /**< kernels that this device could use */
  int num_threads;            /**< worker threads (CPU), else 0 */
  int64_t memory_bytes;       /**< memory of the device */
  int64_t max_head_dim;       /**< largest head_dim and value_dim */
  size_t num_dtypes;          /**< number of dtypes */
  const DLDataType* dtypes;   /**< dtypes of q, k, v */
  const char* type;           /**< "cpu", "discrete GPU", "integrated GPU", "virtual GPU" or
                                   "software GPU" */
  const char* driver;         /**< name and version of the device's driver; "" on the CPU */
  const char* watchdog;       /**< what ends long work here, as far as is known; or "" */
  int64_t max_shared_bytes;   /**< memory that a workgroup shares; 0 on the CPU */
  int subgroup_size;          /**< lanes that run together; 0 on the CPU */
} keyfold_device;

/** Devices, the default one first. */
typedef struct keyfold_device_list {
  size_t num_devices;                   /**< number of devices */
  const keyfold_device* const* devices; /**< the devices */
} keyfold_device_list;

/** The devices that can run attention here. An absent device is no error; a wrong environment value
 * is. The list is freed by keyfold_device_list_destroy(). */
KEYFOLD_API keyfold_status keyfold_device_list_create(const keyfold_device_list** list);

/** Frees the list. */
KEYFOLD_API void keyfold_device_list_destroy(const keyfold_device_list* list);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KEYFOLD_KEYFOLD_H */
