"""Tiny models of many architectures, with random weights and a loss: what people fine-tune, from their configurations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[nn.Module], Tensor]]  # a model, and its loss on a batch of its own
VOCAB, ROWS, LENGTH = 96, 3, 12
TEXT: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
MOE: dict[str, Any] = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                         "linear_value_head_dim": 8}  # fmt: skip

# Decoders: the class before "ForCausalLM", and its configuration.
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "OPT": ("OPT", "OPTConfig", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Llama": ("Llama", "LlamaConfig", GROUPED),
    "Qwen3": ("Qwen3", "Qwen3Config", {**GROUPED, "tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3Moe", "Qwen3MoeConfig", MOE),
    "Qwen3-Next": ("Qwen3Next", "Qwen3NextConfig",
                   {**MOE, **DELTA, "shared_expert_intermediate_size": 24,
                    "layer_types": ["linear_attention", "full_attention"]}),
    "GPT-2": ("GPT2LMHead", "GPT2Config",
              {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "NeoX": ("GPTNeoX", "GPTNeoXConfig", TEXT),
    "Gemma3": ("Gemma3", "Gemma3TextConfig", GROUPED),
    "Gemma3n": ("Gemma3n", "Gemma3nTextConfig",
                {**GROUPED, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                 "intermediate_size": [48, 48], "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
                 "layer_types": ["sliding_attention", "full_attention"]}),
    "Mixtral": ("Mixtral", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "DeepSeek-V3": ("DeepseekV3", "DeepseekV3Config",
                    {**TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                     "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
                     "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                     "num_key_value_heads": 4}),
    "GPT-OSS": ("GptOss", "GptOssConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mamba": ("Mamba", "MambaConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "LFM2": ("Lfm2", "Lfm2Config",
             {**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Nemotron-H": ("NemotronH", "NemotronHConfig",
                   {**GROUPED, "num_hidden_layers": 3, "hybrid_override_pattern": "M-*", "ssm_state_size": 4,
                    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8}),
    "Jamba": ("Jamba", "JambaConfig",
              {**GROUPED, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
               "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}),
    "Zamba2": ("Zamba2", "Zamba2Config",
               {**TEXT, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "mamba_d_state": 4,
                "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 8, "use_mem_rope": True, "num_key_value_heads": 4}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", TEXT),
    "ModernBERT": ("ModernBertForSequenceClassification", "ModernBertConfig", TEXT),
    "DistilBERT": ("DistilBertForSequenceClassification", "DistilBertConfig",
                   {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "DeBERTa": ("DebertaV2ForSequenceClassification", "DebertaV2Config",
                {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
    "ALBERT": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16}),
}  # fmt: skip
IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {**TEXT, "image_size": 16, "patch_size": 4}),
    "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig",
                 {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "image_size": 16}),
    "ResNet": ("ResNetForImageClassification", "ResNetConfig",
               {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}),
    "Swin": ("SwinForImageClassification", "SwinConfig",
             {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
}  # fmt: skip
OTHERS = ("T5", "BART", "Whisper", "CLIP", "Wav2Vec2", "nn.TransformerEncoder")
NAMES = (*DECODERS, *ENCODERS, *IMAGES, *OTHERS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def ids(vocab: int = VOCAB) -> Tensor:
    return torch.randint(4, vocab, (ROWS, LENGTH), generator=generator())


def build(name: str) -> Built:
    """In eval mode, float32."""
    import transformers

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        if name in OTHERS:
            model, loss = _other(name, transformers)
        elif name in DECODERS:
            kind, config, options = DECODERS[name]
            whole = f"{kind}Model" if kind.endswith("LMHead") else f"{kind}ForCausalLM"
            model = getattr(transformers, whole)(getattr(transformers, config)(**options))
            loss = _language(model)
        else:
            kind, config, options = (ENCODERS | IMAGES)[name]
            model = getattr(transformers, kind)(getattr(transformers, config)(**options, num_labels=5))
            key = "input_ids" if name in ENCODERS else "pixel_values"
            loss = _classes(key, ids() if name in ENCODERS else torch.randn(ROWS, 3, 16, 16, generator=generator()))
    return model.eval(), loss


def _language(model: nn.Module) -> Callable[[nn.Module], Tensor]:
    batch = ids()
    return lambda m: m(input_ids=batch, labels=batch, use_cache=False).loss


def _classes(key: str, inputs: Tensor) -> Callable[[nn.Module], Tensor]:
    labels = torch.arange(ROWS)
    return lambda m: m(**{key: inputs}, labels=labels).loss


def _other(name: str, transformers: Any) -> Built:
    batch = ids()
    if name == "T5":
        config = transformers.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
        return model, lambda m: m(input_ids=batch, labels=batch).loss
    if name == "BART":
        config = transformers.BartConfig(
            vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config), lambda m: m(input_ids=batch, labels=batch).loss
    if name == "Whisper":
        config = transformers.WhisperConfig(
            vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        sound = torch.randn(ROWS, 8, 32, generator=generator())
        return (
            transformers.WhisperForConditionalGeneration(config),
            lambda m: m(input_features=sound, labels=batch).loss,
        )
    if name == "CLIP":
        text = {**TEXT, "eos_token_id": 95, "bos_token_id": 94}
        config = transformers.CLIPConfig(
            text_config=text, vision_config={**TEXT, "image_size": 16, "patch_size": 8}, projection_dim=16
        )
        picture = torch.randn(ROWS, 3, 16, 16, generator=generator())
        return transformers.CLIPModel(config), lambda m: m(input_ids=batch, pixel_values=picture, return_loss=True).loss
    if name == "Wav2Vec2":
        config = transformers.Wav2Vec2Config(
            **TEXT, conv_dim=(16, 16), conv_kernel=(8, 4), conv_stride=(4, 2), num_feat_extract_layers=2,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, num_labels=5, classifier_proj_size=16,
        )  # fmt: skip
        wave = torch.randn(ROWS, 160, generator=generator())
        model = transformers.Wav2Vec2ForSequenceClassification(config)
        return model, _classes("input_values", wave)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.Sequential(nn.Embedding(VOCAB, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, VOCAB))
    return model, lambda m: nn.functional.cross_entropy(m(batch).flatten(0, 1), batch.flatten())
