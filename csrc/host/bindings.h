// The parts of the Python module polylora._host; module.cpp calls each once.
#pragma once

#include <pybind11/pybind11.h>

namespace polylora::host {

void bind_layout(pybind11::module_& m);
void bind_table_writer(pybind11::module_& m);
void bind_arena_allocator(pybind11::module_& m);

}  // namespace polylora::host
