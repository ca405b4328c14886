// 16 float lanes as four vectors of four, in the vector extensions that GCC and Clang share: SSE2, NEON and whatever a
// baseline has. Included inside the namespace of one instruction set.

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef uint16_t Half8 __attribute__((vector_size(16)));

struct Lanes {
  Float4 a, b, c, d;  // not an array: GCC keeps these in registers
};

inline Lanes zero() { return Lanes{}; }

inline Lanes broadcast(float value) {
  const Float4 all = {value, value, value, value};
  return Lanes{all, all, all, all};
}

inline Float4 load_4(const float* from) {
  Float4 out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

inline Lanes load(const float* from) {
  return Lanes{load_4(from), load_4(from + 4), load_4(from + 8), load_4(from + 12)};
}

inline void store_4(float* to, Float4 value) { std::memcpy(to, &value, sizeof(value)); }

inline Float4 widen(Word4 bits, BFloat16) { return reinterpret_cast<Float4>(bits << 16); }

/// As to_float, four at once.
inline Float4 widen(Word4 bits, Float16) {
  const Word4 magnitude = bits & 0x7fffu;
  const Float4 scaled = reinterpret_cast<Float4>(magnitude << 13) * 0x1p112f;
  const Word4 special = reinterpret_cast<Word4>(magnitude >= 0x7c00u) & 0x7f800000u;
  const Word4 quiet = reinterpret_cast<Word4>(magnitude > 0x7c00u) & 0x00400000u;
  return reinterpret_cast<Float4>(reinterpret_cast<Word4>(scaled) | special | quiet | ((bits & 0x8000u) << 16));
}

/// Halves 0-3 and 4-7 as words. (A conversion of vectors would say the same; GCC makes scalar code of it.)
#if defined(__clang__) || __GNUC__ >= 12
inline Word4 low_words(Half8 h) {
  return reinterpret_cast<Word4>(__builtin_shufflevector(h, Half8{}, 0, 8, 1, 9, 2, 10, 3, 11));
}

inline Word4 high_words(Half8 h) {
  return reinterpret_cast<Word4>(__builtin_shufflevector(h, Half8{}, 4, 8, 5, 9, 6, 10, 7, 11));
}
#else
inline Word4 low_words(Half8 h) {
  return reinterpret_cast<Word4>(__builtin_shuffle(h, Half8{}, Half8{0, 8, 1, 9, 2, 10, 3, 11}));
}

inline Word4 high_words(Half8 h) {
  return reinterpret_cast<Word4>(__builtin_shuffle(h, Half8{}, Half8{4, 8, 5, 9, 6, 10, 7, 11}));
}
#endif

template <class T>
inline Lanes load(const T* from) {
  Half8 low, high;
  std::memcpy(&low, from, sizeof(low));
  std::memcpy(&high, from + 8, sizeof(high));
  return Lanes{widen(low_words(low), T{}), widen(high_words(low), T{}), widen(low_words(high), T{}),
               widen(high_words(high), T{})};
}

inline void store(float* to, const Lanes& value) {
  store_4(to, value.a);
  store_4(to + 4, value.b);
  store_4(to + 8, value.c);
  store_4(to + 12, value.d);
}

template <class T>
inline void store(T* to, const Lanes& value) {
  float lane[16];
  store(lane, value);
  for (int i = 0; i < 16; ++i) from_float(lane[i], to + i);
}

inline Lanes add(const Lanes& x, const Lanes& y) { return Lanes{x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }

inline Lanes multiply_add(const Lanes& x, const Lanes& y, const Lanes& z) {
  return Lanes{z.a + x.a * y.a, z.b + x.b * y.b, z.c + x.c * y.c, z.d + x.d * y.d};
}

template <class T>
inline Lanes load_part(const T* from, int count) {
  T part[16] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}

template <class T>
inline void store_part(T* to, const Lanes& value, int count) {
  T part[16];
  store(part, value);
  std::memcpy(to, part, static_cast<size_t>(count) * sizeof(T));
}

/// to[j * pitch + i] = float(from[i * stride + j]), i in [0, rows <= 16), j in [0, cols <= 16); 0 for i >= rows.
template <class T>
inline void transpose(const T* from, int64_t stride, int rows, int cols, float* to, int64_t pitch) {
  float tile[16][16] = {};
  for (int i = 0; i < rows; ++i) {
    store(tile[i], cols == 16 ? load(from + i * stride) : load_part(from + i * stride, cols));
  }
  for (int j = 0; j < cols; ++j) {
    for (int i = 0; i < 16; ++i) to[j * pitch + i] = tile[i][j];
  }
}
