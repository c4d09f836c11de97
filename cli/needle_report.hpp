// The table, the data and the picture of a row of needle tests.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "needle_trial.hpp"

namespace keyfold::cli {

/// One cell of the heat map.
struct NeedleResult {
  std::int64_t context = 0;  ///< bytes of text
  std::int64_t depth = 0;    ///< percent
  std::string expected;      ///< the phrase
  Answer answer;
  bool passed() const { return answer.text == expected; }
};

/// The heading of the table, and one line of it.
std::string table_heading();
std::string table_line(const NeedleResult& result);

nlohmann::ordered_json as_json(const NeedleResult& result);

/// The depth x context heat map; `setting` is the line below the title.
std::string heat_map(const std::vector<NeedleResult>& results, std::string_view setting);

}  // namespace keyfold::cli
