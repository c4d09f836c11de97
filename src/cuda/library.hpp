// A shared library that is opened at run time, and stays open.
#pragma once

#include <string>

namespace keyfold::cuda {

class Library {
 public:
  /// Whether the library was found; `name` is a file's name, or a path.
  bool open(const std::string& name);
  /// Null where it is not there.
  void* symbol(const char* name) const;

 private:
  void* handle_ = nullptr;
};

}  // namespace keyfold::cuda
