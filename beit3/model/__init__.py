"""Model: Multiway blocks, attention, packing, presets, heads, official files, the exchange folder."""
