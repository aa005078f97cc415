# SPDX-License-Identifier: Apache-2.0
"""What ranks compute with a model that came from elsewhere."""

from pathlib import Path

import numpy as np

from jobs import groups


def computed(path: str, vocabulary: str, lengths: tuple[int, ...], tensor: int) -> dict[str, np.ndarray]:
    """Fill a network that is cut over the ranks, and return this rank's logits, states and attention of a pack."""
    import torch
    from hugging import cells_of

    from megacell.geneformer.interchange.hugging_face import read_sizes
    from megacell.geneformer.interchange.open import load_into
    from megacell.geneformer.model.bert import PackedBert
    from megacell.geneformer.model.config import ModelConfig
    from megacell.geneformer.model.states import attention_maps, hidden_states
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary
    from megacell.training.interchange.nemo import read_config
    from megacell.training.nn.layout import Layout

    opened = Vocabulary.open(vocabulary)
    pack = cells_of(lengths)[0]
    network = ModelConfig.of(read_config(Path(path))["network"]) if Path(path).is_file() else read_sizes(Path(path))
    with groups(tensor), torch.inference_mode():
        bert = PackedBert(network, Layout(tensor=tensor))
        load_into(bert, network, opened, Path(path))
        bert.eval()
        found = {"logits": bert.logits(bert.encode(pack)).numpy()}
        for layer in range(network.layers):
            found[f"states {layer}"] = hidden_states(bert, pack, layer).numpy()
            for cell, weights in enumerate(attention_maps(bert, pack, layer + 1)):
                found[f"attention {layer} {cell}"] = weights.numpy()
        return found


def restored(path: str, pack: dict[str, np.ndarray], tensor: int) -> tuple[np.ndarray, str]:
    """Restore a .nemo file where tensor parallel groups stand; return this rank's logits, and why it can't be saved."""
    import pytest
    from restore import logits

    from megacell.core.errors import UsageError
    from megacell.geneformer.model.geneformer_model import GeneformerModel

    with groups(tensor):
        model = GeneformerModel.restore_from(path).eval()
        with pytest.raises(UsageError) as refused:
            model.weights()
        return logits(model, pack), str(refused.value)
