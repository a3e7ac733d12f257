"""Rewards: how good an image is for its prompt, one number per image from a frozen network.

Every reward is a callable (images, prompts) -> (n,) float32, larger is better, with `settings` that say what it
depends on; see `sana.reward.protocol`. `sana.metric.mean_reward` makes a metric of one; learning from rewards uses the
same functions. A judge (`sana.reward.judge`) chooses among the images of one prompt, by a reward or otherwise. The
published packages no longer import in a current environment, so the small heads are here and the backbones are
open_clip's and transformers'.
"""
