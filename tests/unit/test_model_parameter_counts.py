"""Exact parameter counts of the paper's models, on the meta device (LAVIS printed the first; the others follow).

The counts are those of the published recipes: ViT-g/14 and ViT-L/14 cut before their last block, a BERT-base Q-Former,
32 queries, 30,523 words ([DEC] added) and one projection to the language model.
"""

import pytest
import torch

from blip2train.batch import ImageSpec
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.freezing import count_parameters
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder
from blip2train.model.qformer.qformer import QFormer
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

VIT_G, VIT_L = "eva_giant_patch14_clip_224", "vit_large_patch14_clip_quickgelu_224"
WIDTH = {VIT_G: 1408, VIT_L: 1024}


def vision_encoder(name: str, size: int = 224, trainable_blocks: int | str = 0) -> TimmVisionEncoder:
    image = ImageSpec(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return TimmVisionEncoder(name, image, trainable_blocks=trainable_blocks)


def bert_base(name: str) -> QFormer:
    return QFormer(
        hidden_size=768, num_layers=12, num_heads=12, num_queries=32, cross_attention_every=2, image_dim=WIDTH[name],
        vocab_size=30523, intermediate_size=3072, max_positions=512, dropout=0.1,
    )  # fmt: skip


def opt(width: int) -> DecoderOnly:
    """OPT of the given embedding width; one layer is enough, since none of it trains."""
    return DecoderOnly(
        {
            "model_type": "opt",
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "num_attention_heads": 32,
            "num_hidden_layers": 1,
            "ffn_dim": 64,
        }
    )


def t5(width: int) -> EncoderDecoder:
    return EncoderDecoder(
        {"model_type": "t5", "d_model": width, "num_layers": 1, "d_ff": 64, "decoder_start_token_id": 0}
    )


@pytest.mark.parametrize(
    ("name", "size", "parameters", "tokens"),
    [
        (VIT_G, 224, 985_894_528, 257),
        (VIT_G, 364, 986_485_888, 677),
        (VIT_G, 490, 987_258_880, 1226),
        (VIT_L, 224, 290_581_504, 257),
    ],
)
def test_frozen_vision_encoder(name: str, size: int, parameters: int, tokens: int) -> None:
    with torch.device("meta"):
        encoder = vision_encoder(name, size)
    assert sum(count_parameters(encoder)) == parameters
    assert (encoder.embed_dim, encoder.num_tokens) == (WIDTH[name], tokens)


@pytest.mark.parametrize(
    ("name", "trainable", "frozen"), [(VIT_G, 186_705_470, 985_894_528), (VIT_L, 183_165_758, 290_581_504)]
)
def test_stage1(name: str, trainable: int, frozen: int) -> None:
    with torch.device("meta"):
        model = Blip2Stage1(vision_encoder(name), bert_base(name))
    assert count_parameters(model) == (trainable, frozen)


@pytest.mark.parametrize(("name", "total"), [(VIT_G, 1_173_191_358), (VIT_L, 474_177_342)])
def test_retrieval_fine_tuning_at_364_trains_everything(name: str, total: int) -> None:
    with torch.device("meta"):
        model = Blip2Stage1(vision_encoder(name, 364, "all"), bert_base(name))
    assert count_parameters(model) == (total, 0)


@pytest.mark.parametrize(
    ("name", "language_model", "width", "trainable"),
    [
        (VIT_G, opt, 2560, 107_133_696),  # OPT-2.7B
        (VIT_L, opt, 2560, 103_593_984),
        (VIT_G, opt, 4096, 108_314_880),  # OPT-6.7B
        (VIT_G, t5, 2048, 106_739_968),  # Flan-T5 XL
        (VIT_L, t5, 2048, 103_200_256),
        (VIT_G, t5, 4096, 108_314_880),  # Flan-T5 XXL
    ],
)
def test_stage2(name: str, language_model: type, width: int, trainable: int) -> None:
    with torch.device("meta"):
        model = Blip2Stage2(vision_encoder(name), bert_base(name), language_model(width))
    assert count_parameters(model)[0] == trainable


def test_caption_fine_tuning_with_opt_at_364() -> None:
    with torch.device("meta"):
        model = Blip2Stage2(vision_encoder(VIT_G, 364, "all"), bert_base(VIT_G), opt(2560))
    assert count_parameters(model)[0] == 1_093_619_584
