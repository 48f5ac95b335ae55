// What Python fills and C++ reads: struct fields, and the order of each layer kind's weights.
//
// layout.py declares the same; loading the library compares both (`describe_layout`). A new weight
// or size is one entry in each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace twotower {

constexpr int LANES = 16;  // tokens of a tile: what the widest vector holds

// packed is null for float32; else int8 in blocks of 16 rows: [K/4][16][4], scales, 128 * sums.
#define TWOTOWER_WEIGHT(FIELD) FIELD(const float *, full) FIELD(const int8_t *, packed)

// Sizes that a kind does not have are 0: attention has q_heads to head_dim, Mamba heads to taps, an
// MLP inner.
#define TWOTOWER_LAYER(FIELD)                                                         \
    FIELD(int32_t, kind)                                                              \
    FIELD(int32_t, q_heads) FIELD(int32_t, kv_heads) FIELD(int32_t, head_dim)         \
    FIELD(int32_t, heads) FIELD(int32_t, head_size) FIELD(int32_t, groups)            \
    FIELD(int32_t, state) FIELD(int32_t, taps)                                        \
    FIELD(int32_t, inner)                                                             \
    FIELD(const Weight *, weights)

#define TWOTOWER_TOWER(FIELD)                                                         \
    FIELD(int32_t, vocabulary) FIELD(int32_t, width) FIELD(int32_t, num_layers)       \
    FIELD(float, eps)                                                                 \
    FIELD(const float *, embeddings) FIELD(const float *, norm)                       \
    FIELD(const Layer *, layers)

// A layer's state before a pass: k, v (S, Hk, A); conv (taps - 1, C), oldest first; ssm (H, P, N).
// Null where a kind has none.
#define TWOTOWER_PAST(FIELD)                                                          \
    FIELD(const float *, k) FIELD(const float *, v)                                   \
    FIELD(const float *, conv) FIELD(const float *, ssm)

// What a pass of L tokens leaves of a layer, null where nobody needs it: k, v (L, Hk, A); the state
// after the last token, conv and ssm; or what `twotower_states` makes any state of: window
// (taps - 1 + L, C) before the convolution, mixed (L, C) after it, step (L, H) after softplus.
#define TWOTOWER_OUTPUTS(FIELD)                                                       \
    FIELD(float *, k) FIELD(float *, v) FIELD(float *, conv) FIELD(float *, ssm)      \
    FIELD(float *, window) FIELD(float *, mixed) FIELD(float *, step)

#define TWOTOWER_DECLARE(type, name) type name;
struct Weight { TWOTOWER_WEIGHT(TWOTOWER_DECLARE) };
struct Layer { TWOTOWER_LAYER(TWOTOWER_DECLARE) };
struct Tower { TWOTOWER_TOWER(TWOTOWER_DECLARE) };
struct Past { TWOTOWER_PAST(TWOTOWER_DECLARE) };
struct Outputs { TWOTOWER_OUTPUTS(TWOTOWER_DECLARE) };

// The weights of each kind in order, by our name and the released one; the full field of an absent
// bias is null.
#define TWOTOWER_MAMBA(WEIGHT)                                                        \
    WEIGHT(norm, "norm.weight")                                                       \
    WEIGHT(in, "mixer.in_proj.weight") WEIGHT(in_bias, "mixer.in_proj.bias")          \
    WEIGHT(conv, "mixer.conv1d.weight") WEIGHT(conv_bias, "mixer.conv1d.bias")        \
    WEIGHT(dt_bias, "mixer.dt_bias") WEIGHT(A_log, "mixer.A_log") WEIGHT(D, "mixer.D") \
    WEIGHT(gated_norm, "mixer.norm.weight")                                           \
    WEIGHT(out, "mixer.out_proj.weight") WEIGHT(out_bias, "mixer.out_proj.bias")
#define TWOTOWER_ATTENTION(WEIGHT)                                                    \
    WEIGHT(norm, "norm.weight")                                                       \
    WEIGHT(q, "mixer.q_proj.weight") WEIGHT(q_bias, "mixer.q_proj.bias")              \
    WEIGHT(k, "mixer.k_proj.weight") WEIGHT(k_bias, "mixer.k_proj.bias")              \
    WEIGHT(v, "mixer.v_proj.weight") WEIGHT(v_bias, "mixer.v_proj.bias")              \
    WEIGHT(o, "mixer.o_proj.weight") WEIGHT(o_bias, "mixer.o_proj.bias")
#define TWOTOWER_MLP(WEIGHT)                                                          \
    WEIGHT(norm, "norm.weight")                                                       \
    WEIGHT(up, "mixer.up_proj.weight") WEIGHT(up_bias, "mixer.up_proj.bias")          \
    WEIGHT(down, "mixer.down_proj.weight") WEIGHT(down_bias, "mixer.down_proj.bias")

enum Kind { MAMBA = 'M', ATTENTION = '*', MLP = '-' };

#define TWOTOWER_NAME(name, released) Weight name;
struct MambaWeights { static constexpr int kind = MAMBA; TWOTOWER_MAMBA(TWOTOWER_NAME) };
struct AttentionWeights { static constexpr int kind = ATTENTION; TWOTOWER_ATTENTION(TWOTOWER_NAME) };
struct MLPWeights { static constexpr int kind = MLP; TWOTOWER_MLP(TWOTOWER_NAME) };

template <typename Weights>
const Weights &weights_of(const Layer &layer) {
    return *reinterpret_cast<const Weights *>(layer.weights);
}

// A line for each struct and each kind.
inline std::string describe_layout() {
    std::string text = "LANES: " + std::to_string(LANES) + "\n";
    auto add = [&](const char *type, const char *name, size_t offset) {
        bool is_address = std::string(type).back() == '*';
        text += std::string(is_address ? "address " : type + std::string(" ")) + name;
        text += "@" + std::to_string(offset) + ", ";
    };
#define TWOTOWER_FIELD(type, name) add(#type, #name, offsetof(Struct, name));
#define TWOTOWER_STRUCT(name, FIELDS)                                                 \
    {                                                                                 \
        using Struct = name;                                                          \
        text += #name ": ";                                                           \
        FIELDS(TWOTOWER_FIELD) text += "size " + std::to_string(sizeof(Struct)) + "\n"; \
    }
    TWOTOWER_STRUCT(Weight, TWOTOWER_WEIGHT)
    TWOTOWER_STRUCT(Layer, TWOTOWER_LAYER)
    TWOTOWER_STRUCT(Tower, TWOTOWER_TOWER)
    TWOTOWER_STRUCT(Past, TWOTOWER_PAST)
    TWOTOWER_STRUCT(Outputs, TWOTOWER_OUTPUTS)
#define TWOTOWER_RELEASED(name, released) text += released ", ";
#define TWOTOWER_KIND(Weights, NAMES)                                                 \
    text += std::string(1, char(Weights::kind)) + ": ";                               \
    NAMES(TWOTOWER_RELEASED) text += "\n";
    TWOTOWER_KIND(MambaWeights, TWOTOWER_MAMBA)
    TWOTOWER_KIND(AttentionWeights, TWOTOWER_ATTENTION)
    TWOTOWER_KIND(MLPWeights, TWOTOWER_MLP)
    return text;
}

}  // namespace twotower
