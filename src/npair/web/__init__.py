"""The HTTP service of ``npair web``: search a gallery by photos, embed as OpenAI's clients ask.

guard.py checks every request, app.py has the routes, search.py asks the gallery, embeddings.py
speaks OpenAI's form, and refusals.py says how errors are answered.
"""
