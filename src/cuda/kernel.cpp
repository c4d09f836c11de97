// The kernels' source, and compiling it.
#include "cuda/kernel.hpp"

#include <cstring>
#include <stdexcept>

#include "attend.cu.hpp"
#include "common.cuh.hpp"
#include "decode.cu.hpp"
#include "decode_cluster.cu.hpp"
#include "decode_combine.cuh.hpp"
#include "decode_copies.cuh.hpp"
#include "decode_cursor.cuh.hpp"
#include "decode_merge.cu.hpp"
#include "decode_mma.cu.hpp"
#include "decode_products.cuh.hpp"
#include "decode_results.cuh.hpp"
#include "fold.cuh.hpp"
#include "hopper.cuh.hpp"
#include "mask_bits.cu.hpp"
#include "mask_bits.cuh.hpp"
#include "mask_jobs.cu.hpp"
#include "matrix_units.cuh.hpp"
#include "merge.cu.hpp"
#include "mma.cu.hpp"
#include "mma.cuh.hpp"
#include "pairs.cu.hpp"
#include "pairs.cuh.hpp"
#include "params.cuh.hpp"
#include "results.cuh.hpp"
#include "scores.cuh.hpp"
#include "tensors.cu.hpp"
#include "types.cuh.hpp"
#include "units.cuh.hpp"
#include "wgmma.cu.hpp"
#include "wgmma3.cu.hpp"
#include "wgmma3_fold.cuh.hpp"
#include "wgmma3_jobs.cuh.hpp"
#include "wgmma_ahead.cuh.hpp"
#include "wgmma_biases.cuh.hpp"
#include "wgmma_copies.cuh.hpp"
#include "wgmma_fold.cuh.hpp"
#include "wgmma_jobs.cuh.hpp"
#include "wgmma_marks.cuh.hpp"
#include "wgmma_shares.cuh.hpp"

namespace keyfold::cuda {

SourceFile kernel_source(const std::string& file) {
  for (const SourceFile& source : {SourceFile{"attend.cu", kernels::attend_cu},
                                   {"decode.cu", kernels::decode_cu},
                                   {"decode_cluster.cu", kernels::decode_cluster_cu},
                                   {"decode_merge.cu", kernels::decode_merge_cu},
                                   {"decode_mma.cu", kernels::decode_mma_cu},
                                   {"mask_bits.cu", kernels::mask_bits_cu},
                                   {"mask_jobs.cu", kernels::mask_jobs_cu},
                                   {"merge.cu", kernels::merge_cu},
                                   {"mma.cu", kernels::mma_cu},
                                   {"pairs.cu", kernels::pairs_cu},
                                   {"tensors.cu", kernels::tensors_cu},
                                   {"wgmma.cu", kernels::wgmma_cu},
                                   {"wgmma3.cu", kernels::wgmma3_cu}}) {
    if (file == source.name) return source;
  }
  throw std::out_of_range("no kernel " + file);
}

const std::vector<SourceFile>& kernel_headers() {
  static const auto& all =
      *new std::vector<SourceFile>{{"common.cuh", kernels::common_cuh},
                                   {"decode_combine.cuh", kernels::decode_combine_cuh},
                                   {"decode_copies.cuh", kernels::decode_copies_cuh},
                                   {"decode_cursor.cuh", kernels::decode_cursor_cuh},
                                   {"decode_products.cuh", kernels::decode_products_cuh},
                                   {"decode_results.cuh", kernels::decode_results_cuh},
                                   {"fold.cuh", kernels::fold_cuh},
                                   {"hopper.cuh", kernels::hopper_cuh},
                                   {"mask_bits.cuh", kernels::mask_bits_cuh},
                                   {"matrix_units.cuh", kernels::matrix_units_cuh},
                                   {"mma.cuh", kernels::mma_cuh},
                                   {"pairs.cuh", kernels::pairs_cuh},
                                   {"params.cuh", kernels::params_cuh},
                                   {"results.cuh", kernels::results_cuh},
                                   {"scores.cuh", kernels::scores_cuh},
                                   {"types.cuh", kernels::types_cuh},
                                   {"units.cuh", kernels::units_cuh},
                                   {"wgmma3_fold.cuh", kernels::wgmma3_fold_cuh},
                                   {"wgmma3_jobs.cuh", kernels::wgmma3_jobs_cuh},
                                   {"wgmma_ahead.cuh", kernels::wgmma_ahead_cuh},
                                   {"wgmma_biases.cuh", kernels::wgmma_biases_cuh},
                                   {"wgmma_copies.cuh", kernels::wgmma_copies_cuh},
                                   {"wgmma_fold.cuh", kernels::wgmma_fold_cuh},
                                   {"wgmma_jobs.cuh", kernels::wgmma_jobs_cuh},
                                   {"wgmma_marks.cuh", kernels::wgmma_marks_cuh},
                                   {"wgmma_shares.cuh", kernels::wgmma_shares_cuh}};
  return all;
}

std::vector<std::byte> compile(const Nvrtc& nvrtc, const KernelSpec& spec,
                               const std::string& target, std::string* log) {
  return nvrtc.compile(kernel_source(spec.file), kernel_headers(), target, spec.options, log);
}

}  // namespace keyfold::cuda
