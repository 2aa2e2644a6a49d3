import torch
import torch.nn.functional as F

from blip2train.objective.similarity import query_likeness, query_text_similarity


def _features(images: int = 4, texts: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image_MQE = F.normalize(torch.randn(images, 3, 6, generator=generator, dtype=dtype), dim=-1)
    return image_MQE, F.normalize(torch.randn(texts, 6, generator=generator, dtype=dtype), dim=-1)


def test_equals_the_largest_dot_product_of_a_naive_loop() -> None:
    image_MQE, text_NE = _features()
    similarity_MN = query_text_similarity(image_MQE, text_NE)
    for m in range(4):
        for n in range(5):
            dots = [sum(float(a) * float(b) for a, b in zip(query, text_NE[n], strict=True)) for query in image_MQE[m]]
            assert abs(float(similarity_MN[m, n]) - max(dots)) < 1e-12


def test_gradient_reaches_the_winning_query_only() -> None:
    image_MQE, text_NE = _features(images=1, texts=1)
    image_MQE.requires_grad_()
    query_text_similarity(image_MQE, text_NE).sum().backward()
    winner = int((image_MQE[0] @ text_NE[0]).argmax())
    expected_QE = torch.zeros_like(image_MQE[0])
    expected_QE[winner] = text_NE[0]
    torch.testing.assert_close(image_MQE.grad[0], expected_QE, rtol=0, atol=1e-15)


def test_stays_in_float32_under_autocast_and_keeps_float64() -> None:
    image_MQE, text_NE = _features()
    assert query_text_similarity(image_MQE, text_NE).dtype == torch.float64
    image_MQE, text_NE = image_MQE.bfloat16(), text_NE.bfloat16()
    exact = query_text_similarity(image_MQE.double(), text_NE.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity_MN = query_text_similarity(image_MQE, text_NE)
    assert similarity_MN.dtype == torch.float32
    torch.testing.assert_close(similarity_MN.double(), exact, rtol=0, atol=1e-6)


def test_one_image_one_query_one_text_keep_their_dimensions() -> None:
    assert query_text_similarity(torch.ones(1, 1, 2), torch.ones(1, 2)).shape == (1, 1)


def test_likeness_of_queries_is_the_mean_cosine_of_their_pairs() -> None:
    features = F.normalize(torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    pairs = [features[m, a] @ features[m, b] for m in range(3) for a in range(5) for b in range(5) if a != b]
    assert torch.isclose(query_likeness(features), torch.stack(pairs).mean(), atol=1e-12)


def test_likeness_is_one_for_queries_that_agree_and_for_a_single_one() -> None:
    same = F.normalize(torch.ones(2, 1, 4), dim=-1)
    assert abs(query_likeness(same.expand(2, 6, 4)).item() - 1.0) < 1e-6
    assert query_likeness(same).item() == 1.0
    assert not query_likeness(same.requires_grad_()).requires_grad
