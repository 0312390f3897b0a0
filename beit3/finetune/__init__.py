"""Finetuning: one Task a file. Nothing here yet; contrastive tuning for retrieval is `beit3.pretrain.contrastive`."""
