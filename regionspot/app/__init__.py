"""``regionspot app``: a local web page to recognize regions of one's own images; needs the extra ``app`` (Gradio)."""
