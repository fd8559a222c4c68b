"""The demo, a web page: `python -m localization_heads.apps.demo` (extra `demo`).

`session` runs the model and holds the state of a question, `visitors` bounds the state of all open pages, `drawing`
draws the images, `page` and `tracing` are the gradio components, and `serving` and `guard` serve the page safely.
"""
