/* KEYFOLD_API marks what libkeyfold exports; everything else is hidden. */
#ifndef KEYFOLD_EXPORT_H
#define KEYFOLD_EXPORT_H

#if defined(_WIN32)
#define KEYFOLD_API
#else
#define KEYFOLD_API __attribute__((visibility("default")))
#endif

#endif /* KEYFOLD_EXPORT_H */
