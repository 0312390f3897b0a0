"""Search in folders of pictures: embed them once, find them by sentences and by pictures."""
