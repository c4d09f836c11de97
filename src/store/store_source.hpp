// The keys of a store as a source.
#pragma once

#include "store/log.hpp"
#include "store/windowed_source.hpp"

namespace keyfold::store {

/// With `follow`, waits for keys behind `end`.
std::unique_ptr<KeyValueSource> make_store_source(const std::shared_ptr<const File>& file,
                                                  const Layout& layout, const Position& end,
                                                  const SourceOptions& options,
                                                  const FollowOptions* follow);

}  // namespace keyfold::store
