// The library's records as tuples of their fields.
#include "records.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

namespace keyfold::python {
namespace nb = nanobind;
namespace {

thread_local std::optional<Report> last;

Fields as_tuple(const Report& r) {
  return nb::make_tuple(r.backend, r.kernel, r.dispatches, r.longest_dispatch_ms, r.elapsed_ms,
                        r.scratch_bytes, r.staging_bytes, r.recoveries);
}

}  // namespace

Fields as_tuple(const Plan& p) {
  nb::list chunks;
  for (const ChunkBox& c : p.chunks) {
    chunks.append(
        nb::make_tuple(c.group_begin, c.group_end, c.row_begin, c.row_end, c.key_begin, c.key_end));
  }
  return nb::make_tuple(p.backend, p.kernel, p.split_len, p.paced, p.budget_ms, p.keys_per_chunk,
                        p.rows_per_chunk, p.rows_per_block, p.num_row_blocks, p.scratch_bytes,
                        p.staging_bytes, chunks);
}

Fields as_tuple(const DeviceInfo& d) {
  nb::list dtypes;
  for (const DType dtype : d.dtypes) dtypes.append(name_of(dtype));
  return nb::make_tuple(d.backend, d.name, d.kernel, nb::tuple(nb::cast(d.kernels)), d.num_threads,
                        d.memory_bytes, d.max_head_dim, nb::tuple(dtypes), d.type, d.driver,
                        d.watchdog, d.max_shared_bytes, d.subgroup_size);
}

Fields as_tuple(const ContextParallelReport& r) {
  return nb::make_tuple(as_tuple(r.report), r.kv_len, r.messages, r.message_bytes, r.waiting_ms);
}

void keep_report(Report report) { last = std::move(report); }

std::optional<Fields> last_report() {
  if (!last) return std::nullopt;
  return as_tuple(*last);
}

}  // namespace keyfold::python
