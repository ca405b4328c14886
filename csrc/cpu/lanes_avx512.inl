// 16 float lanes as one AVX-512 register. Included inside the namespace of one instruction set. Masked loads and stores
// touch nothing outside the mask.

struct Lanes {
  __m512 value;
};

inline Lanes zero() { return Lanes{_mm512_setzero_ps()}; }

inline Lanes broadcast(float value) { return Lanes{_mm512_set1_ps(value)}; }

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Lanes widen(__m256i bits, BFloat16) {
  return Lanes{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

inline Lanes widen(__m256i bits, Float16) { return Lanes{_mm512_cvtph_ps(bits)}; }

inline Lanes load(const float* from) { return Lanes{_mm512_loadu_ps(from)}; }

template <class T>
inline Lanes load(const T* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), T{});
}

inline Lanes load_part(const float* from, int count) { return Lanes{_mm512_maskz_loadu_ps(first(count), from)}; }

template <class T>
inline Lanes load_part(const T* from, int count) {
  return widen(_mm256_maskz_loadu_epi16(first(count), from), T{});
}

inline __m256i narrow(const Lanes& value, BFloat16) {
  const __m512i bits = _mm512_castps_si512(value.value);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i half_up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value.value, value.value, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_srli_epi32(half_up, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40)));
}

inline __m256i narrow(const Lanes& value, Float16) { return _mm512_cvtps_ph(value.value, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* to, const Lanes& value) { _mm512_storeu_ps(to, value.value); }

template <class T>
inline void store(T* to, const Lanes& value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value, T{}));
}

inline void store_part(float* to, const Lanes& value, int count) {
  _mm512_mask_storeu_ps(to, first(count), value.value);
}

template <class T>
inline void store_part(T* to, const Lanes& value, int count) {
  _mm256_mask_storeu_epi16(to, first(count), narrow(value, T{}));
}

inline Lanes add(const Lanes& a, const Lanes& b) { return Lanes{_mm512_add_ps(a.value, b.value)}; }

inline Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return Lanes{_mm512_fmadd_ps(a.value, b.value, c.value)};
}

/// Two transposes of 8x8 words side by side. r[c] in: 8 words of row i in each 256-bit half, rows (0-3 | 4-7) in
/// r[0..3] and (8-11 | 12-15) in r[4..7]. r[c] out: word c of rows 0..15.
inline void transpose_16x8(__m512i (&r)[8]) {
  __m512i t[8];
  POLYLORA_UNROLL
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  __m512i u[8];  // u[c]: 128-bit parts (word c of rows 0-3, c + 4 of 0-3, c of 4-7, c + 4 of 4-7); u[c + 4]: rows 8-15
  POLYLORA_UNROLL
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  POLYLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i64x2(u[i], u[i + 4], 0x88);
    r[i + 4] = _mm512_shuffle_i64x2(u[i], u[i + 4], 0xdd);
  }
}

/// `cols` elements in the low end of a register, zeros above. The common counts need no mask: masked loads are slower.
template <class T>
inline __m256i load_bits(const T* from, int cols) {
  if (cols == 16) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if (cols == 8) return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_maskz_loadu_epi16(first(cols), from);
}

inline __m256i load_bits(const float* from, int cols) {
  if (cols == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_maskz_loadu_epi32(static_cast<__mmask8>(first(cols)), from);
}

/// Row `i` and row `i + 4`; rows from `rows` on are zeros and not read.
template <class T>
inline __m512i load_rows(const T* from, int64_t stride, int i, int rows, int cols) {
  const __m256i low = i < rows ? load_bits(from + i * stride, cols) : _mm256_setzero_si256();
  const __m256i high = i + 4 < rows ? load_bits(from + (i + 4) * stride, cols) : _mm256_setzero_si256();
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline Lanes low_half(__m512i words, BFloat16) { return Lanes{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))}; }

inline Lanes high_half(__m512i words, BFloat16) {
  return Lanes{_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

inline Lanes low_half(__m512i words, Float16) { return Lanes{_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))}; }

inline Lanes high_half(__m512i words, Float16) {
  return Lanes{_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)))};
}

template <class T>
inline void load_16x8(const T* from, int64_t stride, int rows, int cols, __m512i (&r)[8]) {
  POLYLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = load_rows(from, stride, i, rows, cols);
    r[i + 4] = load_rows(from, stride, i + 8, rows, cols);
  }
  transpose_16x8(r);
}

/// to[j * pitch + i] = float(from[i * stride + j]), i in [0, rows <= 16), j in [0, cols <= 16); 0 for i >= rows.
inline void transpose(const float* from, int64_t stride, int rows, int cols, float* to, int64_t pitch) {
  for (int j0 = 0; j0 < cols; j0 += 8) {
    const int part = cols - j0 < 8 ? cols - j0 : 8;
    __m512i r[8];
    load_16x8(from + j0, stride, rows, part, r);
    POLYLORA_UNROLL
    for (int j = 0; j < 8; ++j) {
      if (j < part) _mm512_storeu_si512(to + (j0 + j) * pitch, r[j]);
    }
  }
}

/// As above; two neighbours of a row travel as one word.
template <class T>
inline void transpose(const T* from, int64_t stride, int rows, int cols, float* to, int64_t pitch) {
  __m512i r[8];
  load_16x8(from, stride, rows, cols, r);
  POLYLORA_UNROLL
  for (int j = 0; j < 16; j += 2) {
    if (j < cols) store(to + j * pitch, low_half(r[j / 2], T{}));
    if (j + 1 < cols) store(to + (j + 1) * pitch, high_half(r[j / 2], T{}));
  }
}
