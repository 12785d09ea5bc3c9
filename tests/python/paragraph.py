"""A paragraph of prose that tests repeat until a prompt is as long as they need."""

PARAGRAPH = (
    "The harbour was quiet in the early morning. Fishing boats lay side by side, their nets drying on the quay, and a "
    "smell of salt and tar hung in the air. An old man sat on a crate and mended a rope with slow, careful hands. "
)
