"""Tiny networks with random weights of the architectures in mlx-lm that a small configuration can build."""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

VOCABULARY = 320
FULL, SLIDING = "full_attention", "sliding_attention"

# what an architecture has no use for is left out by its `from_dict`
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "qk_norm": True,
    "post_norm": False,
    "tie_word_embeddings": False,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "layer_types": [FULL, FULL],
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # multipliers
    "logits_scaling": 4.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    # GPT-2's names
    "n_embd": 64,
    "n_inner": 96,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_heads": 2,
    "n_positions": 512,
    "n_ctx": 512,
    "block_size": 512,
    "hidden_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    # layers with a state
    "conv_kernel": 4,
    "conv_bias": True,
    "conv_L_cache": 3,
    "use_conv_bias": True,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": False,
}
DELTA = {"layer_types": ["linear_attention", FULL]}
ROPE = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
MULTIMODAL = "text_config"  # the language model's own configuration inside one of text and images

# architecture: what it needs beside COMMON
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {"num_kv_reuse_layers": 1},
    "afmoe": {},
    "apertus": {},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "cohere": {},
    "cohere2": {},
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": {},
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}},
    "deepseek_v3": {},
    "dots1": {"scoring_func": "noaux_tc"},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_k": 2},
    "exaone": {},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True], "layer_types": [SLIDING, FULL]},
    "falcon_h1": {},
    "gemma": {},
    "gemma2": {},
    "gemma3": {MULTIMODAL: {}},
    "gemma3_text": {},
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "layer_types": [SLIDING, FULL],
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {"rope_scaling": None},
    "glm4_moe_lite": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": [SLIDING, FULL]},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "helium": {},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": False,
        "cla_share_factor": 1,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {
        "block_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "layer_types": ["conv", FULL],
    },
    "lfm2_moe": {"use_expert_bias": True, "num_dense_layers": 1, "layer_types": ["conv", FULL]},
    "lille-130m": {},
    "llama": {},
    "llama4": {
        MULTIMODAL: {
            "model_type": "llama4_text",
            "attention_chunk_size": 64,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 96,
            "rope_scaling": None,
        }
    },
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 1,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba": {},
    "mamba2": {"num_heads": 8, "time_step_limit": (0.0, 100.0), "intermediate_size": 128},
    "mimo": {},
    "minicpm": {},
    "minicpm3": {"rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
    "minimax": {"rotary_dim": 8},
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 512,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "mistral3": {MULTIMODAL: {"model_type": "llama"}},
    "mixtral": {},
    "muse_glimmer": {},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*"], "layer_types": None},
    "olmo2": {},
    "olmo3": {"layer_types": [SLIDING, FULL]},
    "olmo_hybrid": DELTA,
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi": {},
    "phi3": {"partial_rotary_factor": 1.0},
    "phimoe": {},
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": 64, "rotary_dim": 8},
    "pixtral": {MULTIMODAL: {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16},
    "plamo3": {},
    "qwen": {"kv_channels": 16},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5": {MULTIMODAL: {"full_attention_interval": 2, **ROPE}},
    "qwen3_moe": {},
    "qwen3_next": {"full_attention_interval": 2},
    "qwen3_vl": {MULTIMODAL: {"model_type": "qwen3"}},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "spark2_5": {"layer_types": [SLIDING, FULL], "rope_parameters": {FULL: {}, SLIDING: {}}},
    "stablelm": {},
    "starcoder2": {},
    "step3p5": {"num_attention_groups": 2, "moe_top_k": 2, "share_expert_dim": 32, "moe_layers_enum": "1"},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {},
}


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """The network of an architecture, in float32, its configuration as in the table but for `changes`.

    Every weight gets some noise, since layers whose weights start as zeros or ones would hide errors.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {"model_type": name, **COMMON, **ARCHITECTURES[name], **changes}
    if MULTIMODAL in config:
        config[MULTIMODAL] = {"model_type": name, **COMMON, **config[MULTIMODAL], **changes}
    mx.random.seed(seed)
    net: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    net.set_dtype(mx.float32)
    net.update(tree_map(_noisy, net.parameters()))
    mx.eval(net.parameters())
    return net


def _noisy(weight: mx.array) -> mx.array:
    return weight + 0.02 * mx.random.normal(weight.shape) if weight.dtype == mx.float32 else weight
