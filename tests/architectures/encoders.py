"""Encoders, and models of an encoder and a decoder."""

from functools import partial
from typing import Any

from building import SMALL, TOKENS, Architecture, architecture, encoder, sequences, text
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

SHORT = {**SMALL, "max_position_embeddings": 32}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    **TOKENS, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def no_memory() -> dict[str, Any]:
    return {**text(), "use_mems": False}


ENCODERS: tuple[Architecture, ...] = (
    encoder("bert", small=SHORT),
    encoder("roberta", small=SHORT, pad_token_id=0),
    encoder("distilbert", small={"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    encoder("albert", small=SHORT, embedding_size=16),
    encoder("electra", small=SHORT, embedding_size=16),
    encoder("deberta", small=SHORT, unlike={"autocast": "its mask overflows bfloat16"}, relative_attention=True,
        pos_att_type=["c2p", "p2c"]),
    encoder("deberta-v2", small=SHORT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    encoder("longformer", small=SHORT, attention_window=[4, 4], pad_token_id=0),
    encoder("modernbert", small=SHORT, **TOKENS, cls_token_id=1, sep_token_id=2,
        auto=AutoModelForSequenceClassification),
    encoder("mpnet", small=SHORT, pad_token_id=0),
    encoder("xlnet", small={"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        inputs=no_memory),
    encoder("convbert", small=SHORT, embedding_size=16),
    encoder("fnet", small=SHORT),
)  # fmt: skip


seq2seq = partial(architecture, family="encoder-decoder", inputs=sequences, auto=AutoModelForSeq2SeqLM)

ENCODER_DECODERS = (
    seq2seq("t5", **T5),
    seq2seq("mt5", **T5),
    seq2seq("bart", **BART),
    seq2seq("pegasus", **BART),
    seq2seq("m2m_100", **BART),
    seq2seq("marian", **BART),
    seq2seq("led", **{**BART, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32,
        "attention_window": [4, 4]}),
    seq2seq("longt5", **T5, local_radius=3, encoder_attention_type="local"),
)  # fmt: skip
