// Register tiles are arrays: their loops must unroll at any optimisation level.
#pragma once

#if defined(__clang__)
#define POLYLORA_UNROLL _Pragma("unroll")
#else
#define POLYLORA_UNROLL _Pragma("GCC unroll 16")
#endif
