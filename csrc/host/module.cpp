// polylora._host: host objects with state. No torch header: tensors come in as addresses and numpy arrays.
#include "bindings.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of polylora: plan layout, slice table writer, arena allocator.";
  polylora::host::bind_layout(m);
  polylora::host::bind_table_writer(m);
  polylora::host::bind_arena_allocator(m);
}
