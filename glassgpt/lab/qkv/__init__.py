"""`glassgpt lab qkv`: fused against separate projections, tied against untied heads."""
