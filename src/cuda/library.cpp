// Opening libraries, by system.
#include "cuda/library.hpp"

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace keyfold::cuda {

#ifdef _WIN32
bool Library::open(const std::string& name) {
  handle_ = LoadLibraryA(name.c_str());
  return handle_ != nullptr;
}
void* Library::symbol(const char* name) const {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle_), name));
}
#else
bool Library::open(const std::string& name) {
  handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  return handle_ != nullptr;
}
void* Library::symbol(const char* name) const { return dlsym(handle_, name); }
#endif

}  // namespace keyfold::cuda
