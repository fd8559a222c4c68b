"""The page to try: `python -m localization_heads.apps.demo` (extra `demo`).

`session` knows what was asked and what heads are on, `drawing` makes its images, `page` is the gradio side, and
`serving` puts it on an address.
"""
