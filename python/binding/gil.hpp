// The GIL around long calls, for threads that may outlive the interpreter.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace keyfold::python {

/// body(), which takes the GIL, or runs Python, which gives and takes it at any time. When the
/// interpreter ends while a daemon thread is in there, CPython before 3.14 ends the thread by
/// pthread_exit(), which cannot unwind through C++: such a thread waits for the end of the process
/// instead, as from 3.14 on.
template <typename Body>
auto outliving_python(const Body& body) {
  try {
    return body();
  } catch (const abi::__forced_unwind&) {
    while (true) pause();
  }
}

/// Gives the GIL to other threads as long as it lives.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  GilReleased(const GilReleased&) = delete;
  ~GilReleased() {
    outliving_python([this] { PyEval_RestoreThread(state_); });
  }

 private:
  PyThreadState* state_;
};

/// Takes the GIL back for as long as it lives.
class GilHeld {
 public:
  GilHeld() : state_(outliving_python([] { return PyGILState_Ensure(); })) {}
  GilHeld(const GilHeld&) = delete;
  ~GilHeld() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

}  // namespace keyfold::python
