// Opens a checkpoint that fp8pack packed, multiplies one weight with a random activation through cuBLASLt (or
// hipBLASLt), and checks the result against a GEMM in double on the host.
//
//   gemm CHECKPOINT [WEIGHT] [--tokens M] [--cpu]
//
// Exit code 0: agreement; 1: failure; 2: no device. --cpu touches no device: it computes from the same buffers.
#include <cstdio>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <type_traits>

#include "activation.hpp"

#if defined(FP8PACK_HIPBLASLT) || defined(__HIP_PLATFORM_AMD__)
#ifndef __HIP_PLATFORM_AMD__
#define __HIP_PLATFORM_AMD__
#endif
#include <hip/hip_runtime_api.h>
#include <hipblaslt/hipblaslt.h>
#define LT(name) hipblasLt##name
#define GPU(name) hip##name
#define BLAS_ENUM(name) HIPBLAS_##name
#define LT_ENUM(name) HIPBLASLT_##name
#define TYPE_ENUM(name) HIP_##name
constexpr const char* library = "hipBLASLt";
#else
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#define LT(name) cublasLt##name
#define GPU(name) cuda##name
#define BLAS_ENUM(name) CUBLAS_##name
#define LT_ENUM(name) CUBLASLT_##name
#define TYPE_ENUM(name) CUDA_##name
constexpr const char* library = "cuBLASLt";
#endif

namespace {

using fp8pack::GemmMode;
using GpuError = GPU(Error_t);
using DataType = decltype(TYPE_ENUM(R_32F));
using ScaleMode = LT(MatmulMatrixScale_t);

constexpr double tolerance = 5e-3;  // a result that is exact but for its rounding to BF16 is off by 1.7e-3
constexpr std::size_t workspace_nbytes = std::size_t{32} << 20;
constexpr int num_algorithms = 8;

void check(GpuError status, const char* what) {
    if (status != GPU(Success)) {
        throw std::runtime_error(std::string(what) + ": " + GPU(GetErrorString)(status));
    }
}

template <typename Status>
void check_blas(Status status, const char* what) {
    if (status != BLAS_ENUM(STATUS_SUCCESS)) {
        throw std::runtime_error(std::string(what) + ": status " + std::to_string(static_cast<int>(status)));
    }
}

// Device memory, filled with zeros, 256-byte aligned.
class Buffer {
public:
    explicit Buffer(std::size_t nbytes) : nbytes_(nbytes) {
        check(GPU(Malloc)(&data_, nbytes), "allocating");
        check(GPU(Memset)(data_, 0, nbytes), "clearing");
    }
    explicit Buffer(const std::vector<std::uint8_t>& bytes) : Buffer(bytes.size()) {
        upload(bytes.data(), bytes.size(), bytes.size(), 1);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { static_cast<void>(GPU(Free)(data_)); }

    // Copies rows of `width` bytes to lines of `pitch` bytes: what lies between stays zero.
    void upload(const std::uint8_t* bytes, std::size_t width, std::size_t pitch, std::size_t rows) {
        check(GPU(Memcpy2D)(data_, pitch, bytes, width, width, rows, GPU(MemcpyHostToDevice)), "copying to the device");
    }

    void* data() const { return data_; }
    std::size_t nbytes() const { return nbytes_; }

private:
    void* data_ = nullptr;
    std::size_t nbytes_;
};

template <typename Handle, auto destroy>
struct Destroy {
    void operator()(std::remove_pointer_t<Handle>* handle) const { static_cast<void>(destroy(handle)); }
};
template <typename Handle, auto destroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<Handle, destroy>>;
using Library = Owned<LT(Handle_t), LT(Destroy)>;
using Operation = Owned<LT(MatmulDesc_t), LT(MatmulDescDestroy)>;
using Layout = Owned<LT(MatrixLayout_t), LT(MatrixLayoutDestroy)>;
using Preference = Owned<LT(MatmulPreference_t), LT(MatmulPreferenceDestroy)>;

// gfx942 has FP8 of its own (FNUZ): the same byte means half as much, and 0x80 is NaN instead of -0.
bool is_fnuz() {
#ifdef __HIP_PLATFORM_AMD__
    hipDeviceProp_t properties;
    check(hipGetDeviceProperties(&properties, 0), "asking for the device");
    return std::string(properties.gcnArchName).rfind("gfx942", 0) == 0;
#else
    return false;
#endif
}

DataType element_type(fp8pack::Format format, bool fnuz) {
#ifdef __HIP_PLATFORM_AMD__
    if (fnuz) {
        return format == fp8pack::Format::e4m3 ? HIP_R_8F_E4M3_FNUZ : HIP_R_8F_E5M2_FNUZ;
    }
#endif
    static_cast<void>(fnuz);
    return format == fp8pack::Format::e4m3 ? TYPE_ENUM(R_8F_E4M3) : TYPE_ENUM(R_8F_E5M2);
}

std::vector<std::uint8_t> to_fnuz(std::vector<std::uint8_t> payload) {
    std::replace(payload.begin(), payload.end(), std::uint8_t{0x80}, std::uint8_t{0});
    return payload;
}

std::vector<std::uint8_t> doubled(std::vector<std::uint8_t> scales) {
    for (std::size_t i = 0; i + sizeof(float) <= scales.size(); i += sizeof(float)) {
        float scale = 0;
        std::memcpy(&scale, &scales[i], sizeof scale);
        scale *= 2;
        std::memcpy(&scales[i], &scale, sizeof scale);
    }
    return scales;
}

// The scale mode of the weight (A) or of the activation (B).
ScaleMode scale_mode(GemmMode mode, bool is_weight) {
    switch (mode) {
        case GemmMode::channel: return LT_ENUM(MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
        case GemmMode::block128:
            return is_weight ? LT_ENUM(MATMUL_MATRIX_SCALE_BLK128x128_32F) : LT_ENUM(MATMUL_MATRIX_SCALE_VEC128_32F);
        case GemmMode::mx: return LT_ENUM(MATMUL_MATRIX_SCALE_VEC32_UE8M0);
        default: return LT_ENUM(MATMUL_MATRIX_SCALE_SCALAR_32F);
    }
}

template <typename Attribute, typename Value>
void set(const Operation& operation, Attribute attribute, const Value& value, const char* what) {
    check_blas(LT(MatmulDescSetAttribute)(operation.get(), attribute, &value, sizeof value), what);
}

Operation make_operation(GemmMode mode, const Buffer& a_scale, const Buffer& b_scale) {
    LT(MatmulDesc_t) made = nullptr;
    check_blas(LT(MatmulDescCreate)(&made, BLAS_ENUM(COMPUTE_32F), TYPE_ENUM(R_32F)), "describing the GEMM");
    Operation operation(made);
    const auto transposed = BLAS_ENUM(OP_T), plain = BLAS_ENUM(OP_N);
    set(operation, LT_ENUM(MATMUL_DESC_TRANSA), transposed, "transposing A");
    set(operation, LT_ENUM(MATMUL_DESC_TRANSB), plain, "leaving B");
    set(operation, LT_ENUM(MATMUL_DESC_A_SCALE_POINTER), a_scale.data(), "the scales of A");
    set(operation, LT_ENUM(MATMUL_DESC_B_SCALE_POINTER), b_scale.data(), "the scales of B");
    if (mode != GemmMode::tensor) {  // which is the default, and all that libraries before 12.8 know
        set(operation, LT_ENUM(MATMUL_DESC_A_SCALE_MODE), scale_mode(mode, true), "the scale mode of A");
        set(operation, LT_ENUM(MATMUL_DESC_B_SCALE_MODE), scale_mode(mode, false), "the scale mode of B");
    }
    return operation;
}

// Column-major, without gaps between columns: a row-major [N, K] is K x N here.
Layout make_layout(DataType type, std::uint64_t rows, std::uint64_t cols) {
    LT(MatrixLayout_t) made = nullptr;
    const auto line = static_cast<std::int64_t>(rows);
    check_blas(LT(MatrixLayoutCreate)(&made, type, rows, cols, line), "describing a matrix");
    return Layout(made);
}

Preference make_preference() {
    LT(MatmulPreference_t) made = nullptr;
    check_blas(LT(MatmulPreferenceCreate)(&made), "making a preference");
    Preference preference(made);
    check_blas(LT(MatmulPreferenceSetAttribute)(preference.get(), LT_ENUM(MATMUL_PREF_MAX_WORKSPACE_BYTES),
                                                &workspace_nbytes, sizeof workspace_nbytes),
               "limiting the workspace");
    return preference;
}

// The operands on the device, padded as the GEMM wants them. n, k: padded.
struct Operands {
    GemmMode mode;
    DataType a_type, b_type;
    std::uint64_t m, n, k;
    Buffer a, b, a_scale, b_scale;
};

// D [N x M], column-major, is y [M, N], row-major: A is the weight, B the activation, both along K.
std::vector<std::uint16_t> multiply(const Operands& operands) {
    LT(Handle_t) made = nullptr;
    check_blas(LT(Create)(&made), "opening the library");
    const Library handle(made);
    const Operation operation = make_operation(operands.mode, operands.a_scale, operands.b_scale);
    const Layout a = make_layout(operands.a_type, operands.k, operands.n);
    const Layout b = make_layout(operands.b_type, operands.k, operands.m);
    const Layout d = make_layout(TYPE_ENUM(R_16BF), operands.n, operands.m);
    const Preference preference = make_preference();
    LT(MatmulHeuristicResult_t) candidates[num_algorithms] = {};
    int found = 0;
    const auto status = LT(MatmulAlgoGetHeuristic)(handle.get(), operation.get(), a.get(), b.get(), d.get(), d.get(),
                                                   preference.get(), num_algorithms, candidates, &found);
    if (status == BLAS_ENUM(STATUS_NOT_SUPPORTED) || found == 0) {
        throw std::runtime_error(std::string(library) + " has no algorithm for this scale mode on this device");
    }
    check_blas(status, "asking for algorithms");
    const Buffer workspace(workspace_nbytes), y(operands.m * operands.n * sizeof(std::uint16_t));
    const float alpha = 1, beta = 0;
    for (int i = 0; i < found; ++i) {  // the first that runs
        const auto ran = LT(Matmul)(handle.get(), operation.get(), &alpha, operands.a.data(), a.get(),
                                    operands.b.data(), b.get(), &beta, y.data(), d.get(), y.data(), d.get(),
                                    &candidates[i].algo, workspace.data(), workspace.nbytes(), nullptr);
        if (ran == BLAS_ENUM(STATUS_SUCCESS)) {
            check(GPU(DeviceSynchronize)(), "multiplying");
            std::vector<std::uint16_t> result(operands.m * operands.n);
            check(GPU(Memcpy)(result.data(), y.data(), y.nbytes(), GPU(MemcpyDeviceToHost)), "copying from the device");
            return result;
        }
    }
    throw std::runtime_error("none of " + std::to_string(found) + " algorithms ran");
}

// y [M, N] as the device computes it.
std::vector<float> run_on_device(const fp8pack::PackedWeight& weight, const Activation& activation) {
    const GemmMode mode = fp8pack::gemm_mode(weight.granularity);
    const auto [n, k] = fp8pack::padded_shape(weight.n, weight.k, mode);
    const bool fnuz = is_fnuz();
    std::vector<std::uint8_t> a_scale = fp8pack::gemm_scales(weight), b_scale = gemm_scales(activation, mode);
    std::vector<std::uint8_t> converted;
#ifdef __HIP_PLATFORM_AMD__
    if (mode == GemmMode::block128 || mode == GemmMode::mx) {
        throw std::runtime_error("this example knows no hipBLASLt layout for block scales");
    }
#endif
    if (fnuz) {
        a_scale = doubled(std::move(a_scale));
        b_scale = doubled(std::move(b_scale));
        converted = to_fnuz({weight.qdata, weight.qdata + weight.qdata_nbytes});
    }
    Operands operands{mode,
                      element_type(weight.format, fnuz),
                      element_type(fp8pack::Format::e4m3, fnuz),
                      activation.m,
                      n,
                      k,
                      Buffer(n * k),
                      Buffer(fnuz ? to_fnuz(activation.payload) : activation.payload),
                      Buffer(a_scale),
                      Buffer(b_scale)};
    operands.a.upload(fnuz ? converted.data() : weight.qdata, weight.k, k, weight.n);
    const std::vector<std::uint16_t> halves = multiply(operands);
    std::vector<float> result(activation.m * weight.n);
    for (std::size_t i = 0; i < result.size(); ++i) {
        const std::uint32_t bits = std::uint32_t{halves[i / weight.n * n + i % weight.n]} << 16;
        std::memcpy(&result[i], &bits, sizeof bits);
    }
    return result;
}

struct Options {
    std::string checkpoint, weight;
    std::uint64_t tokens = 16;
    bool on_cpu = false;
};

Options parse(int count, char** arguments) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string argument = arguments[i];
        if (argument == "--cpu") {
            options.on_cpu = true;
        } else if (argument == "--tokens" && i + 1 < count) {
            options.tokens = std::stoull(arguments[++i]);
        } else if (options.checkpoint.empty()) {
            options.checkpoint = argument;
        } else {
            options.weight = argument;
        }
    }
    if (options.checkpoint.empty() || options.tokens == 0 || options.tokens > 65536) {
        throw std::runtime_error("usage: gemm CHECKPOINT [WEIGHT] [--tokens M] [--cpu]");
    }
    options.tokens = (options.tokens + 15) / 16 * 16;  // block scales want a multiple of 4, FP8 operands may want 16
    return options;
}

bool has_device() {
    int count = 0;
    return GPU(GetDeviceCount)(&count) == GPU(Success) && count > 0;
}

int run(const Options& options) {
    const fp8pack::Checkpoint checkpoint(options.checkpoint);
    if (checkpoint.weights().empty()) {
        throw std::runtime_error(options.checkpoint + " holds no packed weight");
    }
    const fp8pack::PackedWeight& weight =
        options.weight.empty() ? checkpoint.weights().begin()->second : checkpoint.at(options.weight);
    const GemmMode mode = fp8pack::gemm_mode(weight.granularity);
    if (mode == GemmMode::none) {
        throw std::runtime_error(std::string(library) + " has no scale mode for " + weight.granularity.name +
                                 ": fp8pack::dequantize() gives its values for another GEMM");
    }
    if (weight.qdata_nbytes == 0) {
        throw std::runtime_error(weight.name + " is empty");
    }
    if (!options.on_cpu && !has_device()) {
        std::cerr << (std::string(library) == "cuBLASLt" ? "no CUDA device\n" : "no HIP device\n");
        return 2;
    }
    const Activation activation = quantize(random_values(options.tokens * weight.k), options.tokens, weight);
    const std::vector<float> result = options.on_cpu ? emulate(weight, activation) : run_on_device(weight, activation);
    const double error = error_of(result, reference(weight, activation));
    std::printf("%s  %s  M %zu  N %zu  K %zu  %s  error %.2e  %s\n", weight.name.c_str(),
                weight.granularity.name.c_str(), static_cast<std::size_t>(options.tokens),
                static_cast<std::size_t>(weight.n), static_cast<std::size_t>(weight.k),
                options.on_cpu ? "on the CPU" : library, error, error <= tolerance ? "ok" : "WRONG");
    return error <= tolerance ? 0 : 1;  // a NaN is no agreement
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run(parse(count, arguments));
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
