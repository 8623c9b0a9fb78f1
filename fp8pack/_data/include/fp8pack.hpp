// fp8pack.hpp: reads a checkpoint that `fp8pack pack` wrote, and lays its scales out for cuBLASLt. C++17 and POSIX, no
// dependency but fp8pack_safetensors.hpp beside it.
//
//   fp8pack::Checkpoint checkpoint("Llama-3.1-8B-FP8-block");
//   const fp8pack::PackedWeight& weight = checkpoint.at("model.layers.0.mlp.down_proj.weight");
//   weight.qdata;                                     // N x K FP8 bytes, row-major, mapped from the file
//   std::vector<std::uint8_t> scales = fp8pack::gemm_scales(weight);   // as cuBLASLt reads them
//
// A scale is always the multiplier that dequantizes: value = fp8 * scale. That is what the A and B scale pointers of
// cublasLtMatmul take; a reciprocal is needed nowhere. Weights are [N, K] = [out_features, in_features].
//
// | granularity   | GemmMode | scale mode of the weight                      | activations                | GPU   |
// |---------------|----------|-----------------------------------------------|----------------------------|-------|
// | tensor        | tensor   | CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F       | tensor, SCALAR_32F         | SM89+ |
// | channel       | channel  | CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F    | token, OUTER_VEC_32F       | SM90  |
// | block:128x128 | block128 | CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F   | 1 x 128, VEC128_32F        | SM90  |
// | mx            | mx       | CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0      | 1 x 32, VEC32_UE8M0        | SM100+|
// | group:G, else | none     | there is none: dequantize() is for these      |                            |       |
//
// Source: https://docs.nvidia.com/cuda/cublas/#narrow-precision-data-types-usage (modes, layouts, compute capabilities)
// and https://docs.nvidia.com/cuda/cublas/#cublasltmatmul (operands: K-major both, 16-byte pointers and dimensions).
//
// Every length and offset is checked before it is used; what is wrong is an fp8pack::Error of one sentence. Files are
// mapped, so they must not be cut short while a Checkpoint is open.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fp8pack_safetensors.hpp"

namespace fp8pack {

enum class Format { e4m3, e5m2 };
enum class GemmMode { tensor, channel, block128, mx, none };

// The region of a weight that shares one scale; 0 is the whole axis.
struct Granularity {
    std::string name;
    std::uint64_t rows = 0, cols = 0;
};

// A packed weight [N, K]: fp8 bytes, and scales as stored: F32, or E8M0 exponents as U8, in tiles of 128 x 4 if tiled.
// scales_of() gives them as floats that multiply.
struct PackedWeight {
    std::string name, file, source_dtype;
    Format format = Format::e4m3;
    Granularity granularity;
    std::uint64_t n = 0, k = 0;
    std::uint64_t block_rows = 1, block_cols = 1;
    const std::uint8_t* qdata = nullptr;
    std::size_t qdata_nbytes = 0;
    Tensor stored_scale;
    bool tiled = false;
    std::optional<float> input_scale;  // of what enters the weight, if static

    std::uint64_t grid_rows() const { return (n + block_rows - 1) / block_rows; }
    std::uint64_t grid_cols() const { return (k + block_cols - 1) / block_cols; }
};

namespace detail {

// What fp8pack.json says of one stored tensor, and of one tensor of the source with all that lies beside it.
struct Stored {
    std::string tensor, dtype, layout, kind, point;
    Shape shape;
};

struct Entry {
    std::string action, file, tensor, dtype, format, granularity, layout, source_dtype;
    Shape shape;
    Stored scale;
    std::vector<Stored> activation_scales, markers;
};

inline Stored read_stored(JsonReader& json) {
    Stored stored;
    json.object([&](const std::string& key) {
        std::string* field = key == "tensor"  ? &stored.tensor
                             : key == "dtype" ? &stored.dtype
                             : key == "kind"  ? &stored.kind
                             : key == "point" ? &stored.point
                                              : nullptr;
        if (field != nullptr) {
            *field = json.text();
        } else if (key == "layout") {
            stored.layout = json.text_or_null().value_or("");
        } else if (key == "shape") {
            stored.shape = json.wholes(max_rank);
        } else {
            json.skip();
        }
    });
    return stored;
}

inline Entry read_manifest_entry(JsonReader& json) {
    Entry entry;
    const std::map<std::string_view, std::string*> texts = {
        {"action", &entry.action}, {"file", &entry.file},         {"dtype", &entry.dtype},
        {"format", &entry.format}, {"granularity", &entry.granularity}, {"layout", &entry.layout},
        {"source_dtype", &entry.source_dtype}};
    json.object([&](const std::string& key) {
        const auto text = texts.find(key);
        if (text != texts.end()) {
            *text->second = json.text();
        } else if (key == "tensor") {
            entry.tensor = json.text_or_null().value_or("");
        } else if (key == "shape") {
            entry.shape = json.wholes(max_rank);
        } else if (key == "scale_inv") {
            entry.scale = read_stored(json);
        } else if (key == "activation_scales") {
            json.array([&] { entry.activation_scales.push_back(read_stored(json)); });
        } else if (key == "markers") {
            json.array([&] { entry.markers.push_back(read_stored(json)); });
        } else {
            json.skip();
        }
    });
    return entry;
}

// The tensors of a manifest; refuses a schema other than 1 before it looks at them.
inline std::map<std::string, Entry> read_manifest(const std::string& path) {
    const std::string file = base_name(path);
    const Mapping mapping(path, file);
    if (mapping.size() > max_manifest_nbytes) {
        throw Error(file + " has " + std::to_string(mapping.size()) + " bytes: a manifest over 1 GiB is refused");
    }
    std::map<std::string, Entry> entries;
    bool is_known = false;
    JsonReader json(mapping.text(), file);
    json.object([&](const std::string& section) {
        if (section == "fp8pack") {
            json.object([&](const std::string& key) {
                if (key != "schema") {
                    json.skip();
                } else if (json.whole() != 1) {
                    throw Error(file + " has a schema that this header does not know: use a newer one");
                } else {
                    is_known = true;
                }
            });
        } else if (section == "tensors") {
            json.object([&](const std::string& name) { entries[name] = read_manifest_entry(json); });
        } else {
            json.skip();
        }
    });
    json.finish();
    if (!is_known) throw Error(file + " is no manifest of fp8pack");
    return entries;
}

// A number without a sign or leading zeros, from a name such as group:64.
inline std::optional<std::uint64_t> size_of(std::string_view text, std::size_t most_digits) {
    std::uint64_t value = 0;
    for (const char letter : text.substr(0, most_digits)) value = value * 10 + static_cast<std::uint64_t>(letter - '0');
    const bool is_number = text.find_first_not_of("0123456789") == std::string_view::npos;
    const bool fits = is_number && !text.empty() && text.size() <= most_digits && text[0] != '0';
    return fits ? std::optional(value) : std::nullopt;
}

inline std::optional<Granularity> parse_granularity(const std::string& name) {
    const std::string_view text = name;
    if (name == "tensor" || name == "channel" || name == "mx") {
        return Granularity{name, name == "tensor" ? 0u : 1u, name == "mx" ? 32u : 0u};
    }
    if (text.substr(0, 6) == "group:") {
        const auto cols = size_of(text.substr(6), 9);
        return cols ? std::optional(Granularity{name, 1, *cols}) : std::nullopt;
    }
    const std::size_t cross = text.find('x');
    if (text.substr(0, 6) != "block:" || cross == std::string_view::npos) return std::nullopt;
    const auto rows = size_of(text.substr(6, cross - 6), 5), cols = size_of(text.substr(cross + 1), 9);
    return rows && cols ? std::optional(Granularity{name, *rows, *cols}) : std::nullopt;
}

inline bool is_file_name(const std::string& name) {
    const auto is_unsafe = [](char letter) {
        const auto byte = static_cast<unsigned char>(letter);
        return byte < 0x20 || byte == 0x7f || letter == '/' || letter == '\\';
    };
    return name.size() <= 255 && ends_with(name, ".safetensors") && std::none_of(name.begin(), name.end(), is_unsafe);
}

}  // namespace detail

// A packed checkpoint: a directory, or a single `.safetensors` file with its manifest beside it. Everything that
// fp8pack.json says of dtypes, shapes and scales is held against the files; pointers live as long as this does.
class Checkpoint {
public:
    explicit Checkpoint(const std::string& path) {
        const bool is_single = detail::ends_with(path, ".safetensors");
        const std::string only = is_single ? detail::base_name(path) : "";
        const std::string folder = is_single ? path.substr(0, path.size() - only.size()) : path + "/";
        manifest_ = is_single ? only.substr(0, only.size() - 12) + ".fp8pack.json" : "fp8pack.json";
        for (const auto& [name, entry] : detail::read_manifest(folder + manifest_)) {
            if (!detail::is_file_name(entry.file) || (is_single && entry.file != only)) {
                refuse(name, "lies in " + detail::quoted(entry.file) + ", which is no file of this checkpoint");
            }
            open(folder, entry.file);
            add(name, entry);
        }
        if (!unclaimed_.empty()) refuse(*unclaimed_.begin(), "is in the files, but not in the manifest");
    }

    // Raises Error if no packed weight has this name.
    const PackedWeight& at(const std::string& name) const {
        const auto found = weights_.find(name);
        if (found == weights_.end()) refuse(name, "is no packed weight of this checkpoint");
        return found->second;
    }

    const std::map<std::string, PackedWeight>& weights() const { return weights_; }
    const std::map<std::string, Tensor>& tensors() const { return tensors_; }  // of all files, scales too
    const std::map<std::string, float>& kv_scales() const { return kv_scales_; }  // by point, as self_attn.k

private:
    [[noreturn]] void refuse(const std::string& name, const std::string& problem) const {
        detail::refuse(manifest_, name, problem);
    }

    void open(const std::string& folder, const std::string& file) {
        if (files_.count(file) > 0) return;
        const auto opened = files_.try_emplace(file, folder + file).first;
        for (const Tensor& tensor : opened->second.tensors()) {
            if (!tensors_.emplace(tensor.name, tensor).second) refuse(tensor.name, "stands in two files");
            unclaimed_.insert(tensor.name);
        }
    }

    // The stored tensor, if it is what the manifest says and nothing else took it.
    const Tensor& claim(const std::string& file, const detail::Stored& stored) {
        const auto found = tensors_.find(stored.tensor);
        if (found == tensors_.end() || found->second.file != file || unclaimed_.erase(stored.tensor) == 0) {
            refuse(stored.tensor, "does not lie in " + file + ": the files were changed after packing");
        }
        if (found->second.dtype != stored.dtype || found->second.shape != stored.shape) {
            refuse(stored.tensor, "is " + found->second.dtype + " " + detail::to_text(found->second.shape) +
                                      ", not what the manifest says");
        }
        return found->second;
    }

    void add(const std::string& name, const detail::Entry& entry) {
        detail::check_name(manifest_, name);
        const bool is_packed = entry.action == "packed";
        if (!is_packed && entry.action != "copied" && entry.action != "cast" && entry.action != "unpacked") {
            refuse(name, "has an action that is not known: " + detail::quoted(entry.action));
        }
        if (is_packed && entry.format != "e4m3" && entry.format != "e5m2") {
            refuse(name, "has a format that is not known: " + detail::quoted(entry.format));
        }
        detail::Stored stored;
        stored.tensor = is_packed && !entry.tensor.empty() ? entry.tensor : name;
        stored.dtype = !is_packed ? entry.dtype : entry.format == "e4m3" ? "F8_E4M3" : "F8_E5M2";
        stored.shape = entry.shape;
        const Tensor& payload = claim(entry.file, stored);
        if (is_packed) weights_.emplace(name, packed(name, entry, payload));
        for (const detail::Stored& marker : entry.markers) claim(entry.file, marker);
        for (const detail::Stored& activation : entry.activation_scales) {
            add_activation(name, activation, claim(entry.file, activation));
        }
    }

    PackedWeight packed(const std::string& name, const detail::Entry& entry, const Tensor& payload) {
        const auto granularity = detail::parse_granularity(entry.granularity);
        if (!granularity || entry.shape.size() != 2 || entry.layout != "row-major [N, K]") {
            refuse(name, "has a granularity, shape or layout that is not known");
        }
        PackedWeight weight;
        weight.name = name;
        weight.file = entry.file;
        weight.source_dtype = entry.source_dtype;
        weight.format = entry.format == "e4m3" ? Format::e4m3 : Format::e5m2;
        weight.granularity = *granularity;
        weight.n = entry.shape[0];
        weight.k = entry.shape[1];
        weight.block_rows = granularity->rows > 0 ? granularity->rows : std::max<std::uint64_t>(weight.n, 1);
        weight.block_cols = granularity->cols > 0 ? granularity->cols : std::max<std::uint64_t>(weight.k, 1);
        weight.qdata = payload.data;
        weight.qdata_nbytes = payload.nbytes();
        weight.stored_scale = claim(entry.file, entry.scale);
        weight.tiled = entry.scale.layout == "tiles of 128 x 4";
        check_scale(weight, entry.scale);
        return weight;
    }

    void check_scale(const PackedWeight& weight, const detail::Stored& stored) const {
        const bool has_exponents = stored.dtype == "U8";
        const std::uint64_t rows = weight.grid_rows(), cols = weight.grid_cols();
        const std::uint64_t tiles = detail::round_up(rows, 128) * detail::round_up(cols, 4);
        const bool is_known = stored.layout.empty() || (weight.tiled && has_exponents);
        const bool is_mx = weight.granularity.name == "mx";
        if (!is_known || (stored.dtype != "F32" && !has_exponents) || (is_mx && !has_exponents) ||
            detail::count_of(stored.shape) != (weight.tiled ? tiles : rows * cols)) {
            refuse(weight.name, "has scales " + stored.dtype + " " + detail::to_text(stored.shape) +
                                    " that do not fit " + weight.granularity.name);
        }
    }

    void add_activation(const std::string& name, const detail::Stored& stored, const Tensor& tensor) {
        float value = 0;
        if (stored.dtype == "F32" && tensor.nbytes() == sizeof value) std::memcpy(&value, tensor.data, sizeof value);
        if (!std::isfinite(value) || value <= 0) {
            refuse(stored.tensor, "holds no single scale that is positive and finite");
        }
        if (stored.kind == "k" || stored.kind == "v") {
            kv_scales_[stored.point] = value;
        } else if (stored.kind != "input") {
            refuse(stored.tensor, "is a scale of a kind that is not known: " + detail::quoted(stored.kind));
        } else if (weights_.count(name) > 0) {
            weights_.at(name).input_scale = value;
        }
    }

    std::string manifest_;
    std::map<std::string, SafetensorsFile> files_;
    std::map<std::string, Tensor> tensors_;
    std::map<std::string, PackedWeight> weights_;
    std::map<std::string, float> kv_scales_;
    std::set<std::string> unclaimed_;
};

// Which scale mode of cuBLASLt takes a weight as it is stored; the table is at the top of this file.
inline GemmMode gemm_mode(const Granularity& granularity) {
    if (granularity.name == "tensor") return GemmMode::tensor;
    if (granularity.name == "channel") return GemmMode::channel;
    if (granularity.name == "mx") return GemmMode::mx;
    return granularity.rows == 128 && granularity.cols == 128 ? GemmMode::block128 : GemmMode::none;
}

// N and K as a GEMM wants them: FP8 operands need 16-byte pointers and leading dimensions, so K is padded with zeros to
// 16 (mx: to whole blocks of 32) and N to 16. cudaMemcpy2D pads rows on their way to the device.
inline std::pair<std::uint64_t, std::uint64_t> padded_shape(std::uint64_t n, std::uint64_t k, GemmMode mode) {
    return {detail::round_up(n, 16), detail::round_up(k, mode == GemmMode::mx ? 32 : 16)};
}

// Where cuBLASLt looks for the E8M0 scale of row r, column c of a grid whose columns are padded to a multiple of 4.
// Source: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
inline std::size_t tile_offset(std::uint64_t row, std::uint64_t col, std::uint64_t cols) {
    const std::uint64_t tile = row / 128 * (detail::round_up(cols, 4) / 4) + col / 4;
    return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + col % 4;
}

// Scales [rows, cols] in tiles of 128 x 4, padded with zeros.
inline std::vector<std::uint8_t> swizzle(const std::uint8_t* scales, std::uint64_t rows, std::uint64_t cols) {
    std::vector<std::uint8_t> tiles(detail::round_up(rows, 128) * detail::round_up(cols, 4));
    for (std::uint64_t row = 0; row < rows; ++row) {
        for (std::uint64_t col = 0; col < cols; ++col) tiles[tile_offset(row, col, cols)] = scales[row * cols + col];
    }
    return tiles;
}

// 2^(exponent - 127): byte 0 is a subnormal float, byte 255 is NaN.
inline float decode_e8m0(std::uint8_t exponent) {
    return exponent == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, exponent - 127);
}

// The scales of a weight as floats [grid_rows, grid_cols]; Error if one is negative or not finite.
inline std::vector<float> scales_of(const PackedWeight& weight) {
    const std::uint64_t rows = weight.grid_rows(), cols = weight.grid_cols();
    std::vector<float> scales(rows * cols);
    if (weight.stored_scale.dtype == "F32" && !scales.empty()) {
        std::memcpy(scales.data(), weight.stored_scale.data, scales.size() * sizeof(float));  // it may lie unaligned
    } else {
        for (std::uint64_t i = 0; i < scales.size(); ++i) {
            scales[i] = decode_e8m0(weight.stored_scale.data[weight.tiled ? tile_offset(i / cols, i % cols, cols) : i]);
        }
    }
    if (!std::all_of(scales.begin(), scales.end(), [](float scale) { return std::isfinite(scale) && scale >= 0; })) {
        detail::refuse(weight.file, weight.stored_scale.name, "holds a scale that is negative or not finite");
    }
    return scales;
}

// The scales of a weight as the A_SCALE_POINTER of cublasLtMatmul reads them, for the weight padded by padded_shape():
// tensor: one float. channel: a float for each row. block128: [ceil(N/128)] lines along K, each padded to a multiple of
// 4 floats. mx: tiles of 128 x 4 bytes, as stored if they are tiled. Device copies must be 16-byte aligned.
// Source: https://docs.nvidia.com/cuda/cublas/#scaling-factors-layouts
inline std::vector<std::uint8_t> gemm_scales(const PackedWeight& weight) {
    const GemmMode mode = gemm_mode(weight.granularity);
    if (mode == GemmMode::none) {
        const std::string problem = "has no scale mode of cuBLASLt, being " + weight.granularity.name;
        detail::refuse(weight.file, weight.name, problem + ": dequantize() it");
    }
    if (mode == GemmMode::mx) {
        const std::uint8_t* stored = weight.stored_scale.data;
        return weight.tiled ? std::vector<std::uint8_t>(stored, stored + weight.stored_scale.nbytes())
                            : swizzle(stored, weight.grid_rows(), weight.grid_cols());
    }
    const std::vector<float> scales = scales_of(weight);
    const std::uint64_t cols = weight.grid_cols();
    const std::uint64_t line = mode == GemmMode::block128 ? detail::round_up(cols, 4) : cols;
    const std::uint64_t rows = padded_shape(weight.n, weight.k, mode).first;
    const std::uint64_t lines = mode == GemmMode::channel ? rows : weight.grid_rows();
    std::vector<std::uint8_t> laid_out(lines * line * sizeof(float));
    for (std::uint64_t row = 0; row < weight.grid_rows() && cols > 0; ++row) {
        std::memcpy(laid_out.data() + row * line * sizeof(float), scales.data() + row * cols, cols * sizeof(float));
    }
    return laid_out;
}

// The value of each of the 256 bytes: e4m3 has NaN at 0x7F and 0xFF, e5m2 also infinities.
// Source: OCP 8-bit Floating Point Specification 1.0
inline std::array<float, 256> value_table(Format format) {
    const int mantissa_bits = format == Format::e4m3 ? 3 : 2, bias = format == Format::e4m3 ? 7 : 15;
    std::array<float, 256> values{};
    for (int code = 0; code < 128; ++code) {
        const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
        const int whole = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
        float value = std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - bias - mantissa_bits);
        if (format == Format::e5m2 && code >= 0x7c) value = std::numeric_limits<float>::infinity();
        if (code == 0x7f || (format == Format::e5m2 && code > 0x7c)) value = std::numeric_limits<float>::quiet_NaN();
        values[static_cast<std::size_t>(code)] = value;
        values[static_cast<std::size_t>(code + 128)] = -value;
    }
    return values;
}

// A float as BF16, rounded to nearest, ties to even.
inline std::uint16_t to_bfloat16(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>(std::isnan(value) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The weight [N, K], row-major, as floats: fp8 * scale, rounded once. For every granularity.
inline std::vector<float> dequantize(const PackedWeight& weight) {
    const std::array<float, 256> values = value_table(weight.format);
    const std::vector<float> scales = scales_of(weight);
    std::vector<float> result(weight.qdata_nbytes);
    for (std::uint64_t row = 0; row < weight.n; ++row) {
        const std::uint64_t line = row / weight.block_rows * weight.grid_cols();
        for (std::uint64_t col = 0; col < weight.k; ++col) {
            const std::size_t i = row * weight.k + col;
            result[i] = values[weight.qdata[i]] * scales[line + col / weight.block_cols];
        }
    }
    return result;
}

// The same as BF16, for a GEMM without FP8.
inline std::vector<std::uint16_t> dequantize_bfloat16(const PackedWeight& weight) {
    const std::vector<float> values = dequantize(weight);
    std::vector<std::uint16_t> result(values.size());
    std::transform(values.begin(), values.end(), result.begin(), to_bfloat16);
    return result;
}

}  // namespace fp8pack
