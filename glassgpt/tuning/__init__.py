"""After pretraining: examples with a mask, losses, rewards, sampled answers, and one flat file per stage."""
