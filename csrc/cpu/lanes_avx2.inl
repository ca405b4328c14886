// 16 float lanes as two AVX2 registers. Included inside the namespace of one instruction set.

struct Lanes {
  __m256 low, high;
};

inline Lanes zero() { return Lanes{_mm256_setzero_ps(), _mm256_setzero_ps()}; }

inline Lanes broadcast(float value) { return Lanes{_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

inline Lanes load(const float* from) { return Lanes{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

inline __m128i load_8(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

inline __m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }

inline Lanes load(const BFloat16* from) { return Lanes{widen(load_8(from)), widen(load_8(from + 8))}; }

inline Lanes load(const Float16* from) {
  return Lanes{_mm256_cvtph_ps(load_8(from)), _mm256_cvtph_ps(load_8(from + 8))};
}

inline void store(float* to, const Lanes& value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}

/// The bf16 bits of 8 floats in the low halves of 8 words.
inline __m256i round_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i half_up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(_mm256_srli_epi32(half_up, 16), quiet, nan);
}

inline void store(BFloat16* to, const Lanes& value) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(value.low), round_bf16(value.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline void store(Float16* to, const Lanes& value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT));
}

inline Lanes add(const Lanes& a, const Lanes& b) {
  return Lanes{_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return Lanes{_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
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

/// Transposes 8 rows of 8 words.
inline void transpose_8x8(__m256i (&r)[8]) {
  __m256i t[8];
  POLYLORA_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  __m256i u[8];  // u[c], u[c + 4]: words c and c + 4 (by 128-bit half) of rows 0-3 and of rows 4-7
  POLYLORA_UNROLL
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  POLYLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

/// `count` elements of 2 or 4 bytes in the low end of a register, zeros above.
template <class T>
inline __m256i load_bits(const T* from, int count) {
  if (count * sizeof(T) >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if (count * sizeof(T) == 16) return _mm256_zextsi128_si256(load_8(from));
  alignas(32) T part[32 / sizeof(T)] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof(T));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(part));
}

inline __m256 low_half(__m256i words, BFloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }

inline __m256 high_half(__m256i words, BFloat16) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline __m256 high_half(__m256i words, Float16) {
  const __m256i upper = _mm256_srli_epi32(words, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

inline __m256 low_half(__m256i words, Float16) { return high_half(_mm256_slli_epi32(words, 16), Float16{}); }

/// to[j * pitch + i] = float(from[i * stride + j]), i in [0, rows <= 16), j in [0, cols <= 16); 0 for i >= rows.
inline void transpose(const float* from, int64_t stride, int rows, int cols, float* to, int64_t pitch) {
  for (int i0 = 0; i0 < 16; i0 += 8) {
    for (int j0 = 0; j0 < cols; j0 += 8) {
      const int part = cols - j0 < 8 ? cols - j0 : 8;
      __m256i r[8];
      POLYLORA_UNROLL
      for (int i = 0; i < 8; ++i) {
        r[i] = i0 + i < rows ? load_bits(from + (i0 + i) * stride + j0, part) : _mm256_setzero_si256();
      }
      transpose_8x8(r);
      POLYLORA_UNROLL
      for (int j = 0; j < 8; ++j) {
        if (j < part) _mm256_storeu_ps(to + (j0 + j) * pitch + i0, _mm256_castsi256_ps(r[j]));
      }
    }
  }
}

/// As above; two neighbours of a row travel as one word.
template <class T>
inline void transpose(const T* from, int64_t stride, int rows, int cols, float* to, int64_t pitch) {
  for (int i0 = 0; i0 < 16; i0 += 8) {
    __m256i r[8];
    POLYLORA_UNROLL
    for (int i = 0; i < 8; ++i) {
      r[i] = i0 + i < rows ? load_bits(from + (i0 + i) * stride, cols) : _mm256_setzero_si256();
    }
    transpose_8x8(r);
    POLYLORA_UNROLL
    for (int j = 0; j < 16; j += 2) {
      if (j < cols) _mm256_storeu_ps(to + j * pitch + i0, low_half(r[j / 2], T{}));
      if (j + 1 < cols) _mm256_storeu_ps(to + (j + 1) * pitch + i0, high_half(r[j / 2], T{}));
    }
  }
}
