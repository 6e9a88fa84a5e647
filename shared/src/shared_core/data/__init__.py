"""Data without a download, and one loader each for images and texts.

Modules: `shapes` (a procedural image world), `digits` (scikit-learn's images), `text` (the text
that CPython ships), `loading` (embedded, local and hub data through one call), `long_tail`
(imbalanced class profiles), `prompts` (templates for image-text models).
"""
