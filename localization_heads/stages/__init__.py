"""One function per stage: thin shells that read like the section of the paper that they carry out."""
