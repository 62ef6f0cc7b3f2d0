"""Regions against vocabularies, each of which may have its own."""

import numpy as np
import torch

from ..helpers import NAMES, tiny_model

OTHERS = ["zebra", "cup"]


def test_logits_are_scaled_cosines():
    recognizer = tiny_model().recognizer
    tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1], [9], [1], [1]])
    logits = recognizer.classifier(tokens, torch.tensor(1.5))
    texts = recognizer.classifier.text_encoder.encode(NAMES).double().numpy()
    lengths = np.linalg.norm(tokens, axis=1, keepdims=True) * np.linalg.norm(texts, axis=1)
    np.testing.assert_allclose(logits, np.exp(1.5) * (tokens.double().numpy() @ texts.T) / lengths, atol=1e-4)


@torch.no_grad()
def test_vocabulary_per_image():
    recognizer = tiny_model().recognizer
    recognizer.classifier.add("others", OTHERS)
    tokens, feature_map = [torch.randn(2, 32), torch.randn(3, 32)], torch.randn(2, 17, 64)
    mixed, plain = (recognizer.classify(tokens, feature_map, keys) for keys in (["others", ""], ()))
    recognizer.set_vocabulary(OTHERS)
    own = recognizer.classify(tokens, feature_map)
    assert torch.equal(mixed[0], own[0]) and torch.equal(mixed[1], plain[1])
    assert [x.shape[1] for x in mixed] == [len(OTHERS), len(NAMES)]


def test_vocabulary_is_replaced_with_its_embeddings():
    classifier = tiny_model().recognizer.classifier
    before = classifier.embeddings
    classifier.add("default", OTHERS)  # other names under the same key
    assert classifier.embeddings.shape[0] == 2
    classifier.add("default", NAMES)
    torch.testing.assert_close(classifier.embeddings, before)
