// What happens on the host: a random activation, quantized as a weight's scale mode asks, and two GEMMs of the
// operands as quantized, which must agree: one from dequantized values, one from the buffers that cuBLASLt is given.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "fp8pack.hpp"

constexpr float e4m3_max = 448.0f;

// The E4M3 byte of a number of at most 448 in magnitude, rounded to nearest, ties to even.
inline std::uint8_t to_e4m3(float value) {
    const float magnitude = std::fabs(value);
    int exponent = -6;  // numbers below 2^-6 are subnormal
    if (magnitude >= 0x1p-6f) {
        exponent = std::ilogb(magnitude);
    }
    const float steps = std::nearbyint(std::ldexp(magnitude, 3 - exponent));  // 0 to 16; exact but for this rounding
    const int code = ((exponent + 6) << 3) + static_cast<int>(steps);         // a carry goes into the exponent
    return static_cast<std::uint8_t>(std::signbit(value) ? code | 0x80 : code);
}

// An activation [M, K]: payload padded with zeros to the K of the GEMM; scales [M, groups of `group` columns].
struct Activation {
    std::uint64_t m = 0, k = 0, group = 0, groups = 0;
    std::vector<std::uint8_t> payload;
    std::vector<float> scales;

    float scale_at(std::uint64_t row, std::uint64_t col) const { return scales[row * groups + col / group]; }
};

inline std::vector<float> random_values(std::uint64_t count) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    std::generate(values.begin(), values.end(), [&] { return normal(generator); });
    return values;
}

// scale = amax / 448, 1 for zeros; mx: the next power of two, since it is stored as an exponent.
inline float scale_for(float amax, fp8pack::GemmMode mode) {
    if (amax == 0) {
        return 1.0f;
    }
    const float scale = std::max(amax / e4m3_max, std::numeric_limits<float>::min());
    int exponent = 0;
    const float fraction = std::frexp(scale, &exponent);
    return mode == fp8pack::GemmMode::mx ? std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent) : scale;
}

// values [M, K]. tensor: one scale for all, the weight's static one if it has one; channel: one for each token;
// block128: 1 x 128; mx: 1 x 32.
inline Activation quantize(const std::vector<float>& values, std::uint64_t m, const fp8pack::PackedWeight& weight) {
    using fp8pack::GemmMode;
    const GemmMode mode = fp8pack::gemm_mode(weight.granularity);
    Activation result;
    result.m = m;
    result.k = fp8pack::padded_shape(weight.n, weight.k, mode).second;
    result.group = mode == GemmMode::mx ? 32 : mode == GemmMode::block128 ? 128 : result.k;
    result.groups = (result.k + result.group - 1) / result.group;
    std::vector<float> amax(m * result.groups);
    for (std::uint64_t i = 0; i < values.size(); ++i) {
        float& largest = amax[i / weight.k * result.groups + i % weight.k / result.group];
        largest = std::max(largest, std::fabs(values[i]));
    }
    if (mode == GemmMode::tensor) {
        std::fill(amax.begin(), amax.end(), *std::max_element(amax.begin(), amax.end()));
    }
    for (const float largest : amax) {
        const bool is_static = mode == GemmMode::tensor && weight.input_scale;
        result.scales.push_back(is_static ? *weight.input_scale : scale_for(largest, mode));
    }
    result.payload.resize(m * result.k);
    for (std::uint64_t i = 0; i < values.size(); ++i) {
        const std::uint64_t row = i / weight.k, col = i % weight.k;
        const float quotient = values[i] / result.scale_at(row, col);
        result.payload[row * result.k + col] = to_e4m3(std::clamp(quotient, -e4m3_max, e4m3_max));
    }
    return result;
}

// The scales of an activation as the B_SCALE_POINTER of cublasLtMatmul reads them: one float; one for each token;
// M-major [M, ceil(K/128)]; or E8M0 in tiles of 128 x 4. M is a multiple of 4.
// Source: https://docs.nvidia.com/cuda/cublas/#scaling-factors-layouts
inline std::vector<std::uint8_t> gemm_scales(const Activation& activation, fp8pack::GemmMode mode) {
    const std::uint64_t m = activation.m, groups = activation.groups;
    std::vector<float> scales(activation.scales.begin(), activation.scales.end());
    if (mode == fp8pack::GemmMode::mx) {
        std::vector<std::uint8_t> exponents(scales.size());
        const auto exponent_of = [](float scale) { return static_cast<std::uint8_t>(std::ilogb(scale) + 127); };
        std::transform(scales.begin(), scales.end(), exponents.begin(), exponent_of);
        return fp8pack::swizzle(exponents.data(), m, groups);
    }
    if (mode == fp8pack::GemmMode::tensor) {
        scales.resize(1);
    }
    for (std::uint64_t i = 0; mode == fp8pack::GemmMode::block128 && i < scales.size(); ++i) {
        scales[i % groups * m + i / groups] = activation.scales[i];
    }
    std::vector<std::uint8_t> bytes(scales.size() * sizeof(float));
    std::memcpy(bytes.data(), scales.data(), bytes.size());
    return bytes;
}

// y [M, N] in double, from dequantized operands.
inline std::vector<double> reference(const fp8pack::PackedWeight& weight, const Activation& activation) {
    const std::vector<float> values = fp8pack::dequantize(weight);
    const std::array<float, 256> table = fp8pack::value_table(fp8pack::Format::e4m3);
    std::vector<double> result(activation.m * weight.n), line(weight.k);
    for (std::uint64_t row = 0; row < activation.m; ++row) {
        for (std::uint64_t col = 0; col < weight.k; ++col) {
            line[col] = double{table[activation.payload[row * activation.k + col]]} * activation.scale_at(row, col);
        }
        for (std::uint64_t n = 0; n < weight.n; ++n) {
            double sum = 0;
            for (std::uint64_t col = 0; col < weight.k; ++col) {
                sum += line[col] * double{values[n * weight.k + col]};
            }
            result[row * weight.n + n] = sum;
        }
    }
    return result;
}

// One scale from a buffer that is laid out for cuBLASLt: of row `row`, column `col`. `vector`: 1 x 128, not 128 x 128.
inline double scale_from(const std::vector<std::uint8_t>& buffer, fp8pack::GemmMode mode, std::uint64_t row,
                         std::uint64_t col, std::uint64_t rows, std::uint64_t cols, bool vector) {
    using fp8pack::GemmMode;
    if (mode == GemmMode::mx) {
        return fp8pack::decode_e8m0(buffer[fp8pack::tile_offset(row, col / 32, (cols + 31) / 32)]);
    }
    const std::uint64_t line = ((cols + 127) / 128 + 3) / 4 * 4;  // block128: lines along K, padded to 4 floats
    const std::uint64_t index = mode == GemmMode::tensor    ? 0
                                : mode == GemmMode::channel ? row
                                : vector                    ? col / 128 * rows + row
                                                            : row / 128 * line + col / 128;
    float scale = 0;
    std::memcpy(&scale, buffer.data() + index * sizeof scale, sizeof scale);
    return scale;
}

// y [M, N], rounded to BF16 as a GPU would return it, from the very buffers that cuBLASLt is given: it shows that
// scales lie where its documentation says.
inline std::vector<float> emulate(const fp8pack::PackedWeight& weight, const Activation& activation) {
    const fp8pack::GemmMode mode = fp8pack::gemm_mode(weight.granularity);
    const auto [rows, cols] = fp8pack::padded_shape(weight.n, weight.k, mode);
    const std::vector<std::uint8_t> a = fp8pack::gemm_scales(weight), b = gemm_scales(activation, mode);
    const std::array<float, 256> left = fp8pack::value_table(weight.format);
    const std::array<float, 256> right = fp8pack::value_table(fp8pack::Format::e4m3);
    std::vector<float> result(activation.m * weight.n);
    for (std::uint64_t i = 0; i < result.size(); ++i) {
        const std::uint64_t m = i / weight.n, n = i % weight.n;
        double sum = 0;
        for (std::uint64_t begin = 0; begin < weight.k; begin += 32) {  // no scale ends within 32 columns
            double partial = 0;
            for (std::uint64_t col = begin; col < std::min(begin + 32, weight.k); ++col) {
                partial += double{left[weight.qdata[n * weight.k + col]]} *
                           double{right[activation.payload[m * activation.k + col]]};
            }
            sum += partial * scale_from(a, mode, n, begin, rows, cols, false) *
                   scale_from(b, mode, m, begin, activation.m, cols, true);
        }
        const std::uint32_t bits = std::uint32_t{fp8pack::to_bfloat16(static_cast<float>(sum))} << 16;
        std::memcpy(&result[i], &bits, sizeof bits);
    }
    return result;
}

// Relative Frobenius error of y [M, N].
inline double error_of(const std::vector<float>& found, const std::vector<double>& expected) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        difference += (double{found[i]} - expected[i]) * (double{found[i]} - expected[i]);
        size += expected[i] * expected[i];
    }
    return size > 0 ? std::sqrt(difference / size) : std::sqrt(difference);
}
