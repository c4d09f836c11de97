// All checks of arguments, made once, before anything runs. Messages name the argument, what was
// expected and what came. make_problem() of problem.hpp is implemented here too.
#pragma once

#include "core/problem.hpp"
#include "keyfold/state.hpp"

namespace keyfold::core {

/// "host memory" or "memory on CUDA device 0".
std::string text(const Device& device);

/// The shape of a call from its tensors. Throws InvalidArgument when they do not fit together.
AttentionShape check_call(const TensorView& q, const TensorView& k, const TensorView& v);

/// q alone: num_kv_heads, value_dim and kv_len of the result are still 0.
AttentionShape check_query(const TensorView& q);

/// k and v against a shape whose kv_len does not count, and where q is; returns the number of keys.
std::int64_t check_keys(const AttentionShape& shape, const TensorView& k, const TensorView& v,
                        const Device& where = {});

/// The tensors that receive the result, where q is.
void check_output(const AttentionShape& shape, const MutableTensorView& out,
                  const std::optional<MutableTensorView>& lse, const Device& where = {});

/// The tensors of a state; if `written`, they receive it.
void check_state(const AttentionShape& shape, const StateView& state, bool written);

/// A view by itself, in memory of `where`: non-null aligned data (unless it is empty), sizes and
/// strides >= 0, all byte offsets within 63 bits; if `written`, no two elements at one address.
void check_view(const char* name, const TensorView& view, bool written = false,
                const Device& where = {});
/// Throws InvalidArgument unless the tensor is where q is.
void check_device(const char* name, const TensorView& view, const Device& where);

/// Throws InvalidArgument unless the sizes are as expected.
void check_sizes(const char* name, const TensorView& view, const Dims& expected);

}  // namespace keyfold::core
